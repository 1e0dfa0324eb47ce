#include "launcher.h"

#include <atomic>

#include "failure.h"

namespace jdg {
namespace {

std::atomic<uint64_t> execute_count{0};
std::atomic<uint64_t> execute_nanoseconds{0};

struct LaunchArguments {
  std::array<CUtensorMap, kMaxTensorMaps> maps;
  std::array<uint64_t, kMaxParams> words;
  std::array<void*, kMaxParams> pointers;
};

std::string Describe(const LaunchPlan& plan, const Launch& launch, uint32_t grid_x) {
  return Concat("launching kernel ", plan.kernels[launch.kernel].name, plan.label.empty() ? "" : " of ",
                plan.label, " (grid ", grid_x, "x", launch.grid[1], "x", launch.grid[2], ", block ",
                launch.block, ", cluster ", launch.cluster, launch.cooperative ? ", cooperative" : "", ", ",
                launch.shared_memory, " bytes of shared memory)");
}

}  // namespace

LaunchState::LaunchState(LaunchPlan plan) : plan_(std::move(plan)) {
  for (const Step& step : plan_.steps) {
    first_cache_.push_back(caches_.size());
    const Launch* launch = std::get_if<Launch>(&step);
    if (launch == nullptr) continue;
    for (const Param& param : launch->params) {
      if (std::holds_alternative<TensorMap>(param)) caches_.emplace_back();
    }
  }
}

bool LaunchState::Load() { return LoadIn(Driver::Get()) != nullptr; }

const LaunchState::Loaded* LaunchState::LoadIn(const Driver& driver) {
  std::optional<Context> context = CurrentContext(driver);
  if (!context.has_value()) return nullptr;
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Loaded& loaded : loaded_) {
    if (loaded.context_id == context->id) return &loaded;
  }
  Loaded loaded{context->id, {}};
  for (const Step& step : plan_.steps) {
    const Launch* launch = std::get_if<Launch>(&step);
    loaded.kernels.push_back(launch == nullptr ? LoadedKernel{}
                                               : LoadKernel(driver, *context, plan_.kernels[launch->kernel],
                                                            *launch, plan_.label));
  }
  loaded_.push_back(std::move(loaded));
  return &loaded_.back();
}

uintptr_t LaunchState::Address(const BufferViews& buffers, const BufferRef& buffer) const {
  size_t scratch = plan_.scratch_bytes.size();
  size_t own = buffers.num_results - scratch;
  bool operand = buffer.kind == BufferKind::kOperand;
  size_t index = buffer.kind == BufferKind::kScratch ? own + buffer.index : buffer.index;
  size_t count = operand                              ? buffers.num_operands
                 : buffer.kind == BufferKind::kResult ? own
                                                      : buffers.num_results;
  if (index >= count) {
    FailInvalid("the plan of ", plan_.label, " uses ", BufferName(buffer), ", and the call has ",
                buffers.num_operands, " operands and ", own, " results.");
  }
  const BufferView& view = operand ? buffers.operands[index] : buffers.results[index];
  if (buffer.needed_bytes > view.size) {
    FailInvalid(BufferName(buffer), " of ", plan_.label, " has ", view.size,
                " bytes and the plan reaches to byte ", buffer.needed_bytes,
                ". The call was built for other shapes.");
  }
  return reinterpret_cast<uintptr_t>(view.data) + buffer.byte_offset;
}

uintptr_t LaunchState::MemsetAddress(const BufferViews& buffers, const Memset& memset) const {
  uintptr_t address = Address(buffers, memset.buffer);
  if (address % memset.pattern_bytes != 0) {
    FailInvalid(BufferName(memset.buffer), " of ", plan_.label, " is at address 0x", std::hex, address,
                std::dec, ", and the plan sets it in units of ", int{memset.pattern_bytes},
                " bytes, which needs a multiple of that.");
  }
  return address;
}

uintptr_t LaunchState::TensorMapAddress(const BufferViews& buffers, const Launch& launch,
                                        size_t param) const {
  const TensorMap& map = std::get<TensorMap>(launch.params[param]);
  uintptr_t address = Address(buffers, map.buffer);
  uint32_t alignment = FindTensorType(map.type)->alignment;
  if (address % alignment != 0) {
    FailInvalid(BufferName(map.buffer), " of ", plan_.label, " is at address 0x", std::hex, address, std::dec,
                ", and parameter ", param, " of kernel ", plan_.kernels[launch.kernel].name,
                " reads it by TMA, which needs a multiple of ", alignment, ". Slice at multiples of ",
                alignment, " bytes, or copy it first (x + 0 behind jax.lax.optimization_barrier).");
  }
  return address;
}

void LaunchState::CheckBuffers(const BufferViews& buffers) const {
  CheckScratch(buffers);
  for (const Step& step : plan_.steps) {
    if (const Memset* memset = std::get_if<Memset>(&step)) {
      MemsetAddress(buffers, *memset);
      continue;
    }
    if (const Copy* copy = std::get_if<Copy>(&step)) {
      Address(buffers, copy->source);
      Address(buffers, copy->target);
      continue;
    }
    const Launch& launch = std::get<Launch>(step);
    for (size_t i = 0; i < launch.params.size(); ++i) {
      if (const BufferRef* buffer = std::get_if<BufferRef>(&launch.params[i])) Address(buffers, *buffer);
      if (std::holds_alternative<TensorMap>(launch.params[i])) TensorMapAddress(buffers, launch, i);
    }
  }
}

void LaunchState::CheckScratch(const BufferViews& buffers) const {
  if (buffers.num_results >= plan_.scratch_bytes.size()) return;
  FailInvalid("the call of ", plan_.label, " has ", buffers.num_results, " results and its plan needs ",
              plan_.scratch_bytes.size(), " scratch buffers among them.");
}

void LaunchState::Execute(CUstream stream, const BufferViews& buffers) {
  const Driver& driver = Driver::Get();
  CheckScratch(buffers);
  const Loaded* loaded = LoadIn(driver);
  if (loaded == nullptr) FailInternal("no CUDA context is current at execution of ", plan_.label, ".");
  for (size_t i = 0; i < plan_.steps.size(); ++i) {
    if (const Memset* memset = std::get_if<Memset>(&plan_.steps[i])) {
      Set(driver, *memset, stream, buffers);
    } else if (const Copy* copy = std::get_if<Copy>(&plan_.steps[i])) {
      CUdeviceptr source = Address(buffers, copy->source), target = Address(buffers, copy->target);
      if (source == target) continue;
      driver.Check(driver.cuMemcpyDtoDAsync(target, source, copy->num_bytes, stream), "copying ",
                   copy->num_bytes, " bytes of ", plan_.label);
    } else {
      Run(driver, std::get<Launch>(plan_.steps[i]), loaded->kernels[i], stream, buffers, first_cache_[i]);
    }
  }
}

void LaunchState::Set(const Driver& driver, const Memset& memset, CUstream stream,
                      const BufferViews& buffers) const {
  CUdeviceptr address = MemsetAddress(buffers, memset);
  CUresult result = memset.pattern_bytes == 4
                        ? driver.cuMemsetD32Async(address, memset.pattern, memset.num_bytes / 4, stream)
                        : driver.cuMemsetD8Async(address, memset.pattern, memset.num_bytes, stream);
  driver.Check(result, "setting ", memset.num_bytes, " bytes of ", plan_.label);
}

void LaunchState::Run(const Driver& driver, const Launch& launch, const LoadedKernel& kernel, CUstream stream,
                      const BufferViews& buffers, size_t cache) {
  LaunchArguments arguments;  // uninitialised on purpose: 5 KB on the hot path
  size_t maps = 0;
  for (size_t i = 0; i < launch.params.size(); ++i) {
    arguments.pointers[i] = &arguments.words[i];
    if (const BufferRef* buffer = std::get_if<BufferRef>(&launch.params[i])) {
      arguments.words[i] = Address(buffers, *buffer);
    } else if (const Scalar* scalar = std::get_if<Scalar>(&launch.params[i])) {
      arguments.words[i] = scalar->bits;
    } else {
      CUtensorMap* map = &arguments.maps[maps++];
      caches_[cache++].Get(driver, std::get<TensorMap>(launch.params[i]),
                           TensorMapAddress(buffers, launch, i), map);
      arguments.pointers[i] = map;
    }
  }

  LaunchAttributes attributes;
  CUlaunchConfig config = ConfigOf(launch, kernel.grid_x, attributes);
  config.hStream = stream;
  CUresult result = driver.cuLaunchKernelEx(&config, kernel.function, arguments.pointers.data(), nullptr);
  if (result != CUDA_SUCCESS) driver.Fail(result, Describe(plan_, launch, kernel.grid_x));
}

ExecuteCounters GetExecuteCounters() {
  return {execute_count.load(std::memory_order_relaxed), execute_nanoseconds.load(std::memory_order_relaxed)};
}

void ResetExecuteCounters() {
  execute_count = 0;
  execute_nanoseconds = 0;
}

void CountExecute(uint64_t nanoseconds) {
  execute_count.fetch_add(1, std::memory_order_relaxed);
  execute_nanoseconds.fetch_add(nanoseconds, std::memory_order_relaxed);
}

}  // namespace jdg
