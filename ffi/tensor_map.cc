#include "tensor_map.h"

#include "failure.h"

namespace jdg {

namespace {

void CheckKnows4Bits(const Driver& driver, const TensorMap& map) {
  constexpr int kSince = 12080;
  int version = 0;
  driver.cuDriverGetVersion(&version);
  if (version >= kSince) return;
  FailInternal("the tensor map of ", BufferName(map.buffer),
               " has elements of 4 bits, which drivers know since CUDA 12.8; this one is of CUDA ",
               version / 1000, ".", version % 1000 / 10, ". Update it.");
}

}  // namespace

void EncodeTensorMap(const Driver& driver, const TensorMap& map, uintptr_t address, CUtensorMap* out) {
  constexpr cuuint32_t kElementStrides[kMaxRank] = {1, 1, 1, 1, 1};
  static_assert(sizeof(cuuint64_t) == sizeof(uint64_t) && sizeof(cuuint32_t) == sizeof(uint32_t));
  CUresult result = driver.cuTensorMapEncodeTiled(
      out, static_cast<CUtensorMapDataType>(map.type), map.rank, reinterpret_cast<void*>(address),
      reinterpret_cast<const cuuint64_t*>(map.dims.data()),
      reinterpret_cast<const cuuint64_t*>(map.strides.data()),
      reinterpret_cast<const cuuint32_t*>(map.box.data()), kElementStrides, CU_TENSOR_MAP_INTERLEAVE_NONE,
      static_cast<CUtensorMapSwizzle>(map.swizzle), static_cast<CUtensorMapL2promotion>(map.l2_promotion),
      static_cast<CUtensorMapFloatOOBfill>(map.fill));
  if (result == CUDA_SUCCESS) return;
  if (map.type == kPacked4 || map.type == kSpaced4) CheckKnows4Bits(driver, map);
  std::string shape = Concat("dims [");
  for (size_t i = 0; i < map.rank; ++i) shape += Concat(i ? ", " : "", map.dims[i]);
  shape += "], strides [";
  for (size_t i = 0; i + 1 < map.rank; ++i) shape += Concat(i ? ", " : "", map.strides[i]);
  shape += "] bytes, box [";
  for (size_t i = 0; i < map.rank; ++i) shape += Concat(i ? ", " : "", map.box[i]);
  driver.Fail(result, Concat("the driver refuses the tensor map of ", BufferName(map.buffer), ", type ",
                             int{map.type}, ", ", shape, "], swizzle code ", int{map.swizzle}));
}

void TensorMapCache::Get(const Driver& driver, const TensorMap& map, uintptr_t address, CUtensorMap* out) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < used_; ++i) {
      if (addresses_[i] == address) {
        *out = maps_[i];
        return;
      }
    }
  }
  EncodeTensorMap(driver, map, address, out);
  std::lock_guard<std::mutex> lock(mutex_);
  if (maps_.empty()) maps_.resize(kEntries);
  addresses_[next_] = address;
  maps_[next_] = *out;
  next_ = (next_ + 1) % kEntries;
  if (used_ < kEntries) ++used_;
}

}  // namespace jdg
