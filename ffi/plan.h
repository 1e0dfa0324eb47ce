// A decoded launch plan. The format is described in jax_deepgemm/core/plan.py, which writes it.
//
// The bytes may come from a file (persistent compilation cache, exported module), so the decoder trusts
// nothing: every read is bounds-checked, every count and enum is limited, and what it returns can be launched
// without further checks of its own shape (buffers and devices are checked against it at execution).

#ifndef JAX_DEEPGEMM_FFI_PLAN_H_
#define JAX_DEEPGEMM_FFI_PLAN_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

namespace jdg {

inline constexpr uint16_t kPlanVersion = 2;
inline constexpr uint16_t kOldestPlanVersion = kPlanVersion > 1 ? kPlanVersion - 1 : 1;

inline constexpr size_t kMaxSteps = 256;
inline constexpr size_t kMaxParams = 64;
inline constexpr size_t kMaxTensorMaps = 32;
inline constexpr size_t kMaxScratch = 16;
inline constexpr size_t kMaxBuffers = 64;
inline constexpr size_t kMaxRank = 5;

enum class BufferKind : uint8_t { kOperand = 0, kResult = 1, kScratch = 2 };

struct BufferRef {
  BufferKind kind = BufferKind::kOperand;
  uint16_t index = 0;
  uint64_t byte_offset = 0;
  uint64_t needed_bytes = 0;  // from the start of the buffer; derived, not stored
};

enum class ScalarType : uint8_t { kInt32 = 1, kUint32 = 2, kInt64 = 3, kUint64 = 4, kFloat32 = 5 };

struct Scalar {
  ScalarType type = ScalarType::kInt32;
  uint64_t bits = 0;
};

struct TensorMap {
  BufferRef buffer;
  uint8_t type = 0;  // CUtensorMapDataType
  uint8_t rank = 0;
  uint8_t swizzle = 0;       // CUtensorMapSwizzle
  uint8_t l2_promotion = 0;  // CUtensorMapL2promotion
  uint8_t fill = 0;          // CUtensorMapFloatOOBfill
  std::array<uint64_t, kMaxRank> dims = {};
  std::array<uint64_t, kMaxRank - 1> strides = {};
  std::array<uint32_t, kMaxRank> box = {};
};

using Param = std::variant<BufferRef, Scalar, TensorMap>;

struct Launch {
  uint16_t kernel = 0;
  std::array<uint32_t, 3> grid = {};
  uint32_t block = 0;
  uint32_t cluster = 1;
  uint32_t shared_memory = 0;
  bool pdl = false;
  std::vector<Param> params;
};

struct Memset {
  BufferRef buffer;
  uint64_t num_bytes = 0;
  uint8_t value = 0;
};

// Nothing where both are the same memory.
struct Copy {
  BufferRef source;
  BufferRef target;
  uint64_t num_bytes = 0;
};

using Step = std::variant<Launch, Memset, Copy>;

struct KernelRef {
  std::string digest;  // SHA-256 of the cubin, hex
  std::string arch;    // "90a"
  std::string name;
};

struct Plan {
  uint16_t version = 0;
  std::string label;
  std::vector<KernelRef> kernels;
  std::vector<uint64_t> scratch_bytes;
  std::vector<Step> steps;
};

// Throws Failure (kInvalidArgument) on anything but a whole, valid plan.
Plan DecodePlan(const uint8_t* data, size_t size);

// Bytes per element of a CUtensorMapDataType that plans may use, 0 for others.
uint32_t TensorTypeBytes(uint8_t type);

// "operand 0", "scratch 1": how messages call a buffer.
std::string BufferName(const BufferRef& buffer);

}  // namespace jdg

#endif  // JAX_DEEPGEMM_FFI_PLAN_H_
