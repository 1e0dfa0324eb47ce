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

inline constexpr uint16_t kPlanVersion = 3;
inline constexpr uint16_t kOldestPlanVersion = 1;

inline constexpr size_t kMaxSteps = 256;
inline constexpr size_t kMaxParams = 64;
inline constexpr size_t kMaxTensorMaps = 32;
inline constexpr size_t kMaxScratch = 16;
inline constexpr size_t kMaxBuffers = 64;
inline constexpr size_t kMaxRank = 5;
inline constexpr uint16_t kMaxBlocksPerSm = 1024;

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
  uint8_t type = 0;  // CUtensorMapDataType, see TensorType
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
  std::array<uint32_t, 3> grid = {};  // x at most, where blocks_per_sm limits it
  uint32_t block = 0;
  uint32_t cluster = 1;
  uint32_t shared_memory = 0;
  bool pdl = false;
  bool cooperative = false;
  std::vector<Param> params;
  uint16_t blocks_per_sm = 0;  // 0: no limit of grid x
};

struct Memset {
  BufferRef buffer;
  uint64_t num_bytes = 0;
  uint8_t pattern_bytes = 1;  // 1 or 4: the buffer's address and num_bytes are multiples of it
  uint32_t pattern = 0;
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

struct LaunchPlan {
  uint16_t version = 0;
  std::string label;
  std::vector<KernelRef> kernels;
  std::vector<uint64_t> scratch_bytes;
  std::vector<Step> steps;
};

// Throws Failure (kInvalidArgument) on anything but a whole, valid plan.
LaunchPlan DecodePlan(const uint8_t* data, size_t size);

// What TMA asks of a map by its element type (CUDA driver API, cuTensorMapEncodeTiled).
struct TensorType {
  uint32_t bits;              // per element
  bool floating;              // out-of-bounds elements may be NaN
  uint32_t alignment = 16;    // of the address and the strides, in bytes
  uint32_t dim_multiple = 1;  // of dims[0]
};

// By CUtensorMapDataType; null for types that plans of this version may not use.
const TensorType* FindTensorType(uint8_t type, uint16_t version = kPlanVersion);

inline constexpr uint8_t kPacked4 = 13;  // CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN8B, of CUDA 12.8
inline constexpr uint8_t kSpaced4 = 14;  // CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN16B, of CUDA 12.8

// "operand 0", "scratch 1": how messages call a buffer.
std::string BufferName(const BufferRef& buffer);

}  // namespace jdg

#endif  // JAX_DEEPGEMM_FFI_PLAN_H_
