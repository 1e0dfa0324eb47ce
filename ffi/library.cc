#include "library.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "failure.h"
#include "sha256.h"

namespace jdg {
namespace {

struct Function {
  CUfunction handle = nullptr;
  int shared_memory = 0;  // the largest asked for so far; the attribute is only ever raised
  bool wide_cluster = false;
};

struct Store {
  std::mutex cubin_mutex;  // guards cubins, directories
  std::map<std::string, std::shared_ptr<const Bytes>> cubins;
  std::vector<std::string> directories;

  std::mutex load_mutex;  // guards the rest, and is held while the driver loads
  std::map<std::string, CUlibrary> libraries;
  std::map<std::tuple<std::string, std::string, unsigned long long>, Function> functions;
};

// Never destroyed: XLA may run handlers while the process exits.
Store& GetStore() {
  static Store* store = new Store;
  return *store;
}

std::shared_ptr<const Bytes> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return nullptr;
  auto bytes =
      std::make_shared<Bytes>(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  return file.bad() ? nullptr : bytes;
}

template <typename T>
T ReadAt(const Bytes& bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(T));
  return value;
}

// A whole 64-bit ELF file for CUDA. The driver is given no size, so it must not see less or anything else.
bool IsCubin(const Bytes& bytes) {
  constexpr uint16_t kCudaMachine = 190;
  constexpr size_t kHeader = 64;
  if (bytes.size() < kHeader || std::memcmp(bytes.data(), "\177ELF\2", 5) != 0) return false;
  if (ReadAt<uint16_t>(bytes, 18) != kCudaMachine) return false;
  uint64_t program = ReadAt<uint64_t>(bytes, 32);
  uint64_t sections = ReadAt<uint64_t>(bytes, 40);
  uint64_t program_bytes = uint64_t{ReadAt<uint16_t>(bytes, 54)} * ReadAt<uint16_t>(bytes, 56);
  uint64_t section_bytes = uint64_t{ReadAt<uint16_t>(bytes, 58)} * ReadAt<uint16_t>(bytes, 60);
  uint64_t size = bytes.size();
  return program <= size && program_bytes <= size - program && sections <= size &&
         section_bytes <= size - sections;
}

[[noreturn]] void FailMissing(const KernelRef& kernel, const std::string& label) {
  std::string places = "this process";
  for (const std::string& directory : CubinDirectories()) places += ", " + directory;
  FailInvalid(
      "the code of kernel ", kernel.name, " (sm_", kernel.arch, ", SHA-256 ", kernel.digest, ") of ",
      label.empty() ? "a launch plan" : label, " was not found; looked in ", places,
      ". This program was compiled in another process. Trace and compile the function again here, or set "
      "JAX_DEEPGEMM_CACHE_DIR to the kernel cache of that process, or export within "
      "jax_deepgemm.embed_kernels().");
}

int DeviceAttribute(const Driver& driver, CUdevice_attribute attribute, CUdevice device) {
  int value = 0;
  driver.Check(driver.cuDeviceGetAttribute(&value, attribute, device), "cuDeviceGetAttribute");
  return value;
}

std::string DeviceName(const Driver& driver, CUdevice device) {
  char name[128] = "a GPU";
  driver.cuDeviceGetName(name, sizeof(name), device);
  return name;
}

void CheckArch(const Driver& driver, CUdevice device, const KernelRef& kernel) {
  int major = DeviceAttribute(driver, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
  int minor = DeviceAttribute(driver, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
  if (RunsOn(kernel.arch, major, minor)) return;
  FailInvalid("kernel ", kernel.name, " was compiled for sm_", kernel.arch, " and device ", device, " (",
              DeviceName(driver, device), ") is sm_", major, minor,
              ". Lower and compile the function for the device it runs on.");
}

CUlibrary LoadLibrary(const Driver& driver, Store& store, const KernelRef& kernel, const std::string& label) {
  CUlibrary& library = store.libraries[kernel.digest];
  if (library != nullptr) return library;
  FoundCubin found = FindCubin(kernel.digest);
  if (found.bytes == nullptr) FailMissing(kernel, label);
  if (!IsCubin(*found.bytes)) {
    FailInvalid("the code of kernel ", kernel.name, " (", found.bytes->size(), " bytes, from ", found.where,
                ") is not a cubin.");
  }
  driver.Check(
      driver.cuLibraryLoadData(&library, found.bytes->data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
      "loading the code of kernel ", kernel.name, " (sm_", kernel.arch, ", ", found.bytes->size(),
      " bytes, from ", found.where, ")");
  return library;
}

void CheckParams(const Driver& driver, CUfunction function, const KernelRef& kernel, const Launch& launch) {
  if (driver.cuFuncGetParamInfo == nullptr) return;
  size_t offset = 0;
  size_t size = 0;
  for (size_t i = 0; i < launch.params.size(); ++i) {
    const Param& param = launch.params[i];
    size_t given = sizeof(CUdeviceptr);
    if (std::holds_alternative<TensorMap>(param)) given = sizeof(CUtensorMap);
    if (const Scalar* scalar = std::get_if<Scalar>(&param)) {
      given = scalar->type == ScalarType::kInt64 || scalar->type == ScalarType::kUint64 ? 8 : 4;
    }
    if (driver.cuFuncGetParamInfo(function, i, &offset, &size) != CUDA_SUCCESS) {
      FailInvalid("kernel ", kernel.name, " has ", i, " parameters and the plan gives ", launch.params.size(),
                  ".");
    }
    if (size != given) {
      FailInvalid("parameter ", i, " of kernel ", kernel.name, " has ", size, " bytes and the plan gives ",
                  given, ".");
    }
  }
  if (driver.cuFuncGetParamInfo(function, launch.params.size(), &offset, &size) == CUDA_SUCCESS) {
    FailInvalid("kernel ", kernel.name, " has more than the ", launch.params.size(),
                " parameters of the plan.");
  }
}

int FunctionAttribute(const Driver& driver, CUfunction function, CUfunction_attribute attribute) {
  int value = 0;
  driver.Check(driver.cuFuncGetAttribute(&value, attribute, function), "cuFuncGetAttribute");
  return value;
}

void CheckBlock(const Driver& driver, CUdevice device, CUfunction function, const KernelRef& kernel,
                const Launch& launch) {
  int threads = FunctionAttribute(driver, function, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
  if (launch.block > static_cast<uint32_t>(threads)) {
    FailInvalid("kernel ", kernel.name, " can run ", threads, " threads per block (",
                FunctionAttribute(driver, function, CU_FUNC_ATTRIBUTE_NUM_REGS),
                " registers each) and the plan asks for ", launch.block, ".");
  }
  int fixed = FunctionAttribute(driver, function, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
  int limit = DeviceAttribute(driver, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device);
  if (uint64_t{launch.shared_memory} + fixed > static_cast<uint64_t>(limit)) {
    FailInvalid("kernel ", kernel.name, " needs ", launch.shared_memory, " + ", fixed,
                " bytes of shared memory per block (dynamic + static) and device ", device, " (",
                DeviceName(driver, device), ") has ", limit, ".");
  }
}

void SetAttributes(const Driver& driver, Function& function, const KernelRef& kernel, const Launch& launch) {
  int shared_memory = static_cast<int>(launch.shared_memory);
  if (shared_memory > function.shared_memory) {
    driver.Check(driver.cuFuncSetAttribute(function.handle, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                           shared_memory),
                 "allowing ", shared_memory, " bytes of shared memory to kernel ", kernel.name);
    function.shared_memory = shared_memory;
  }
  if (launch.cluster > 8 && !function.wide_cluster) {
    driver.Check(
        driver.cuFuncSetAttribute(function.handle, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1),
        "allowing clusters of ", launch.cluster, " blocks to kernel ", kernel.name);
    function.wide_cluster = true;
  }
}

uint32_t GridX(const Driver& driver, CUdevice device, const Launch& launch) {
  if (launch.blocks_per_sm == 0) return launch.grid[0];
  uint64_t blocks = uint64_t{launch.blocks_per_sm} *
                    DeviceAttribute(driver, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device);
  blocks = std::max<uint64_t>(blocks - blocks % launch.cluster, launch.cluster);
  return static_cast<uint32_t>(std::min<uint64_t>(blocks, launch.grid[0]));
}

// How many blocks of a launch the device runs at the same time.
uint64_t BlocksAtOnce(const Driver& driver, CUdevice device, CUfunction function, const Launch& launch,
                      uint32_t grid_x) {
  int count = 0;
  if (launch.cluster == 1) {
    driver.Check(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, launch.block,
                                                                    launch.shared_memory),
                 "cuOccupancyMaxActiveBlocksPerMultiprocessor");
    return uint64_t(count) * DeviceAttribute(driver, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device);
  }
  Launch plain = launch;
  plain.pdl = plain.cooperative = false;
  LaunchAttributes attributes;
  CUlaunchConfig config = ConfigOf(plain, grid_x, attributes);
  driver.Check(driver.cuOccupancyMaxActiveClusters(&count, function, &config),
               "cuOccupancyMaxActiveClusters");
  return uint64_t(count) * launch.cluster;
}

void CheckCooperative(const Driver& driver, CUdevice device, CUfunction function, const KernelRef& kernel,
                      const Launch& launch, uint32_t grid_x) {
  uint64_t blocks = uint64_t{grid_x} * launch.grid[1] * launch.grid[2];
  uint64_t at_once = BlocksAtOnce(driver, device, function, launch, grid_x);
  if (blocks <= at_once) return;
  FailInvalid("the ", blocks, " blocks of kernel ", kernel.name,
              " wait for each other (a cooperative launch), so all must run at once, and device ", device,
              " (", DeviceName(driver, device), ") runs at most ", at_once,
              ". Plan fewer blocks, or let blocks_per_sm limit them.");
}

}  // namespace

void RegisterCubin(const std::string& digest, const uint8_t* data, size_t size) {
  Store& store = GetStore();
  {
    std::lock_guard<std::mutex> lock(store.cubin_mutex);
    if (store.cubins.count(digest) != 0) return;
  }
  std::string actual = Sha256Hex(data, size);
  if (actual != digest) {
    FailInvalid("a cubin of ", size, " bytes was given with digest ", digest, ", but its SHA-256 is ", actual,
                ".");
  }
  auto bytes = std::make_shared<const Bytes>(data, data + size);
  std::lock_guard<std::mutex> lock(store.cubin_mutex);
  store.cubins.emplace(digest, std::move(bytes));
}

void SetCubinDirectories(std::vector<std::string> directories) {
  Store& store = GetStore();
  std::lock_guard<std::mutex> lock(store.cubin_mutex);
  store.directories = std::move(directories);
}

std::vector<std::string> CubinDirectories() {
  Store& store = GetStore();
  std::lock_guard<std::mutex> lock(store.cubin_mutex);
  return store.directories;
}

FoundCubin FindCubin(const std::string& digest) {
  Store& store = GetStore();
  {
    std::lock_guard<std::mutex> lock(store.cubin_mutex);
    auto known = store.cubins.find(digest);
    if (known != store.cubins.end()) return {known->second, "process"};
  }
  for (const std::string& directory : CubinDirectories()) {
    std::string path = directory + "/" + digest + ".cubin";
    std::shared_ptr<const Bytes> bytes = ReadFile(path);
    if (bytes != nullptr && Sha256Hex(bytes->data(), bytes->size()) == digest) return {bytes, path};
  }
  return {};
}

std::optional<Context> CurrentContext(const Driver& driver) {
  Context context;
  if (driver.cuCtxGetCurrent(&context.handle) != CUDA_SUCCESS || context.handle == nullptr)
    return std::nullopt;
  driver.Check(driver.cuCtxGetId(context.handle, &context.id), "cuCtxGetId");
  return context;
}

CUlaunchConfig ConfigOf(const Launch& launch, uint32_t grid_x, LaunchAttributes& attributes) {
  CUlaunchConfig config = {};
  config.gridDimX = grid_x;
  config.gridDimY = launch.grid[1];
  config.gridDimZ = launch.grid[2];
  config.blockDimX = launch.block;
  config.blockDimY = 1;
  config.blockDimZ = 1;
  config.sharedMemBytes = launch.shared_memory;
  config.attrs = attributes.data();
  if (launch.cluster > 1) {
    CUlaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim = {launch.cluster, 1, 1};
  }
  if (launch.pdl) {
    CUlaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
  }
  if (launch.cooperative) {
    CUlaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
    attribute.value.cooperative = 1;
  }
  return config;
}

LoadedKernel LoadKernel(const Driver& driver, const Context& context, const KernelRef& kernel,
                        const Launch& launch, const std::string& plan_label) {
  CUdevice device = 0;
  driver.Check(driver.cuCtxGetDevice(&device), "cuCtxGetDevice");
  CheckArch(driver, device, kernel);
  Store& store = GetStore();
  std::lock_guard<std::mutex> lock(store.load_mutex);
  Function& function = store.functions[{kernel.digest, kernel.name, context.id}];
  if (function.handle == nullptr) {
    CUkernel handle = nullptr;
    driver.Check(driver.cuLibraryGetKernel(&handle, LoadLibrary(driver, store, kernel, plan_label),
                                           kernel.name.c_str()),
                 "finding kernel ", kernel.name, " in its cubin");
    driver.Check(driver.cuKernelGetFunction(&function.handle, handle), "loading kernel ", kernel.name);
  }
  CheckParams(driver, function.handle, kernel, launch);
  CheckBlock(driver, device, function.handle, kernel, launch);
  SetAttributes(driver, function, kernel, launch);
  uint32_t grid_x = GridX(driver, device, launch);
  if (launch.cooperative) CheckCooperative(driver, device, function.handle, kernel, launch, grid_x);
  return {function.handle, grid_x};
}

bool RunsOn(const std::string& arch, int major, int minor) {
  bool exact = arch.back() == 'a';
  bool suffix = exact || arch.back() == 'f';
  int code = std::stoi(arch.substr(0, arch.size() - (suffix ? 1 : 0)));
  int arch_major = code / 10;
  int arch_minor = code % 10;
  return arch_major == major && (exact ? arch_minor == minor : arch_minor <= minor);
}

}  // namespace jdg
