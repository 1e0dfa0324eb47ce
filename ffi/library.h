// Cubins of this process, and the kernels loaded from them.
//
// A plan names a cubin by SHA-256. It is looked for in the process (registered at lowering, or carried by an
// exported module), then as <directory>/<digest>.cubin in the directories set from Python. Each content
// becomes one CUlibrary, which belongs to no context; each kernel one CUfunction per context, with its
// attributes set. Both stay for the life of the process, as the code of XLA's own kernels does.

#ifndef JAX_DEEPGEMM_FFI_LIBRARY_H_
#define JAX_DEEPGEMM_FFI_LIBRARY_H_

#include <cuda.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "driver.h"
#include "plan.h"

namespace jdg {

using Bytes = std::vector<uint8_t>;

// Throws Failure unless `digest` is the SHA-256 of the bytes. Registering a content again does nothing.
void RegisterCubin(const std::string& digest, const uint8_t* data, size_t size);

void SetCubinDirectories(std::vector<std::string> directories);
std::vector<std::string> CubinDirectories();

struct FoundCubin {
  std::shared_ptr<const Bytes> bytes;
  std::string where;  // "process" or the path
};

// Damaged files are passed over. Nothing found: null bytes.
FoundCubin FindCubin(const std::string& digest);

struct Context {
  CUcontext handle = nullptr;
  unsigned long long id = 0;  // never reused, unlike the handle
};

// The context current in this thread, which XLA has set; none: nullopt.
std::optional<Context> CurrentContext(const Driver& driver);

struct LoadedKernel {
  CUfunction function = nullptr;
  uint32_t grid_x = 0;
};

using LaunchAttributes = std::array<CUlaunchAttribute, 3>;

// What the driver needs to know of a launch, but for its stream; `attributes` become a part of it.
CUlaunchConfig ConfigOf(const Launch& launch, uint32_t grid_x, LaunchAttributes& attributes);

// The kernel, ready to be launched in the current context with this much dynamic shared memory and this
// cluster, and its grid on this device. Throws Failure when the cubin is missing, is for another
// architecture, or the device cannot run it so. `plan_label` is for messages.
LoadedKernel LoadKernel(const Driver& driver, const Context& context, const KernelRef& kernel,
                        const Launch& launch, const std::string& plan_label);

// Whether code compiled for `arch` ("90", "90a", "100f") runs on compute capability major.minor.
bool RunsOn(const std::string& arch, int major, int minor);

}  // namespace jdg

#endif  // JAX_DEEPGEMM_FFI_LIBRARY_H_
