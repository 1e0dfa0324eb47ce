// TMA descriptors, encoded for an address and kept: a jitted function sees few addresses.

#ifndef JAX_DEEPGEMM_FFI_TENSOR_MAP_H_
#define JAX_DEEPGEMM_FFI_TENSOR_MAP_H_

#include <cuda.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <vector>

#include "driver.h"
#include "plan.h"

namespace jdg {

// The address must be a multiple of 16. Throws Failure when the driver refuses.
void EncodeTensorMap(const Driver& driver, const TensorMap& map, uintptr_t address, CUtensorMap* out);

// The descriptors of one TensorMap of a plan, by address. A descriptor does not depend on the device.
class TensorMapCache {
 public:
  void Get(const Driver& driver, const TensorMap& map, uintptr_t address, CUtensorMap* out);

 private:
  static constexpr size_t kEntries = 16;

  std::mutex mutex_;
  size_t next_ = 0;
  size_t used_ = 0;
  std::array<uintptr_t, kEntries> addresses_ = {};
  std::vector<CUtensorMap> maps_;
};

}  // namespace jdg

#endif  // JAX_DEEPGEMM_FFI_TENSOR_MAP_H_
