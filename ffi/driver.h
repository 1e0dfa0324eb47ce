// libcuda, opened when the first kernel is loaded: the module imports and decodes with no driver installed.

#ifndef JAX_DEEPGEMM_FFI_DRIVER_H_
#define JAX_DEEPGEMM_FFI_DRIVER_H_

#include <cuda.h>

#include <string>

#include "failure.h"

namespace jdg {

#define JDG_DRIVER_FUNCTIONS(F)                  \
  F(cuDriverGetVersion)                          \
  F(cuGetErrorName)                              \
  F(cuGetErrorString)                            \
  F(cuCtxGetCurrent)                             \
  F(cuCtxGetId)                                  \
  F(cuCtxGetDevice)                              \
  F(cuDeviceGetAttribute)                        \
  F(cuDeviceGetName)                             \
  F(cuLibraryLoadData)                           \
  F(cuLibraryGetKernel)                          \
  F(cuKernelGetFunction)                         \
  F(cuFuncGetAttribute)                          \
  F(cuFuncSetAttribute)                          \
  F(cuLaunchKernelEx)                            \
  F(cuOccupancyMaxActiveBlocksPerMultiprocessor) \
  F(cuOccupancyMaxActiveClusters)                \
  F(cuTensorMapEncodeTiled)                      \
  F(cuMemsetD8Async)                             \
  F(cuMemsetD32Async)                            \
  F(cuMemcpyDtoDAsync)

// Of CUDA 12.4; null with an older driver.
#define JDG_OPTIONAL_DRIVER_FUNCTIONS(F) F(cuFuncGetParamInfo)

struct Driver {
#define JDG_DECLARE(name) decltype(&::name) name = nullptr;
  JDG_DRIVER_FUNCTIONS(JDG_DECLARE)
  JDG_OPTIONAL_DRIVER_FUNCTIONS(JDG_DECLARE)
#undef JDG_DECLARE

  // Throws Failure when libcuda is missing or too old.
  static const Driver& Get();

  // Throws Failure with the driver's words unless `result` is success; `what` is only put together then.
  template <typename... What>
  void Check(CUresult result, const What&... what) const {
    if (result != CUDA_SUCCESS) Fail(result, Concat(what...));
  }

  [[noreturn]] void Fail(CUresult result, const std::string& what) const;
};

struct DriverInfo {
  bool available = false;
  int version = 0;    // 13000 for CUDA 13.0
  std::string error;  // why it is not available
};

// Opens libcuda and asks its version; creates no context and does not initialise the driver.
DriverInfo GetDriverInfo();

}  // namespace jdg

#endif  // JAX_DEEPGEMM_FFI_DRIVER_H_
