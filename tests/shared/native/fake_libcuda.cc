// A libcuda.so.1 that launches nothing and writes down what it is asked, for tests/core/test_launcher.py.
//
// Environment: FAKE_LOG  file of one line per call that would change something
//              FAKE_PARAMS  sizes of the kernel's parameters, "128,8,4"
//              FAKE_CAPABILITY  "90"      FAKE_FAIL  name of a function that fails
//              FAKE_DRIVER  "12080"       FAKE_SMS, FAKE_BLOCKS, FAKE_CLUSTERS  of the device: SMs, blocks
//              that
//                                         an SM runs at once, clusters that all of them run at once

#include <cuda.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

const char* Env(const char* name, const char* other) {
  const char* value = std::getenv(name);
  return value == nullptr ? other : value;
}

std::vector<size_t> ParamSizes() {
  std::vector<size_t> sizes;
  for (const char* text = Env("FAKE_PARAMS", ""); *text != 0;) {
    char* end = nullptr;
    sizes.push_back(std::strtoul(text, &end, 10));
    text = *end == ',' ? end + 1 : end;
  }
  return sizes;
}

CUresult Done(const char* function) {
  return std::strcmp(Env("FAKE_FAIL", ""), function) == 0 ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}

template <typename... Values>
CUresult Log(const char* function, const char* format, Values... values) {
  std::FILE* file = std::fopen(Env("FAKE_LOG", "/dev/null"), "a");
  std::fprintf(file, "%s", function);
  std::fprintf(file, format, values...);
  std::fputc('\n', file);
  std::fclose(file);
  return Done(function);
}

}  // namespace

extern "C" {

CUresult cuDriverGetVersion(int* version) {
  *version = std::atoi(Env("FAKE_DRIVER", "12080"));
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult, const char** name) {
  *name = "CUDA_ERROR_FAKE";
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "asked to fail";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = std::strcmp(Env("FAKE_FAIL", ""), "no context") == 0 ? nullptr : reinterpret_cast<CUcontext>(16);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetId(CUcontext, unsigned long long* id) {
  *id = 7;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 3;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  int capability = std::atoi(Env("FAKE_CAPABILITY", "90"));
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? capability / 10
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? capability % 10
           : attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT     ? std::atoi(Env("FAKE_SMS", "132"))
                                                                       : 232448;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  std::snprintf(name, size, "Fake GPU");
  return CUDA_SUCCESS;
}

CUresult cuLibraryLoadData(CUlibrary* library, const void*, CUjit_option*, void**, unsigned, CUlibraryOption*,
                           void**, unsigned) {
  *library = reinterpret_cast<CUlibrary>(32);
  return Log("cuLibraryLoadData", "");
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary, const char* name) {
  *kernel = reinterpret_cast<CUkernel>(48);
  return Log("cuLibraryGetKernel", " %s", name);
}

CUresult cuKernelGetFunction(CUfunction* function, CUkernel) {
  *function = reinterpret_cast<CUfunction>(64);
  return Log("cuKernelGetFunction", "");
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 512
           : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 128
                                                                : 1024;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute attribute, int value) {
  return Log("cuFuncSetAttribute", " %d %d", static_cast<int>(attribute), value);
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, CUfunction, int, size_t) {
  *count = std::atoi(Env("FAKE_BLOCKS", "2"));
  return Done("cuOccupancyMaxActiveBlocksPerMultiprocessor");
}

CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig* config) {
  bool alone = config->numAttrs == 1 && config->attrs[0].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  *count = std::atoi(Env("FAKE_CLUSTERS", "60"));
  return alone ? Done("cuOccupancyMaxActiveClusters") : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuFuncGetParamInfo(CUfunction, size_t index, size_t* offset, size_t* size) {
  std::vector<size_t> sizes = ParamSizes();
  if (index >= sizes.size()) return CUDA_ERROR_INVALID_VALUE;
  *offset = 0;
  *size = sizes[index];
  return CUDA_SUCCESS;
}

// The descriptor is its address, so that the launch can show it.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &address, sizeof(address));
  std::string shape;
  for (cuuint32_t i = 0; i < rank; ++i) {
    shape += " " + std::to_string(dims[i]) + "/" + (i == 0 ? "" : std::to_string(strides[i - 1])) + "/" +
             std::to_string(box[i]);
  }
  return Log("cuTensorMapEncodeTiled", " %p type %d%s swizzle %d promotion %d fill %d", address,
             static_cast<int>(type), shape.c_str(), static_cast<int>(swizzle), static_cast<int>(promotion),
             static_cast<int>(fill));
}

CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t size, CUstream) {
  return Log("cuMemsetD8Async", " %p %d %zu", reinterpret_cast<void*>(address), value, size);
}

CUresult cuMemsetD32Async(CUdeviceptr address, unsigned value, size_t count, CUstream) {
  return Log("cuMemsetD32Async", " %p 0x%x %zu", reinterpret_cast<void*>(address), value, count);
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream) {
  return Log("cuMemcpyDtoDAsync", " %p %p %zu", reinterpret_cast<void*>(target),
             reinterpret_cast<void*>(source), size);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction, void** params, void**) {
  std::string text;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    text += attribute.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
                ? " cluster " + std::to_string(attribute.value.clusterDim.x)
            : attribute.id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE ? " cooperative"
                                                              : " pdl";
  }
  std::vector<size_t> sizes = ParamSizes();
  for (size_t i = 0; i < sizes.size(); ++i) {
    unsigned long long value = 0;
    std::memcpy(&value, params[i], sizes[i] < 8 ? sizes[i] : 8);
    char hex[32];
    std::snprintf(hex, sizeof(hex), " 0x%llx", value);
    text += hex;
  }
  return Log("cuLaunchKernelEx", " %ux%ux%u block %u shared %u%s", config->gridDimX, config->gridDimY,
             config->gridDimZ, config->blockDimX, config->sharedMemBytes, text.c_str());
}

}  // extern "C"
