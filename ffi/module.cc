// The Python module jax_deepgemm._ffi: the handlers of the custom call "jax_deepgemm_launch" and what Python
// and the tests need of the native side.

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "driver.h"
#include "failure.h"
#include "launcher.h"
#include "library.h"
#include "plan.h"
#include "xla/ffi/api/ffi.h"

namespace nb = nanobind;
namespace ffi = xla::ffi;

namespace jdg {
namespace {

// The state type of this target on CUDA. A type id belongs to one platform only (XLA assigns it at
// registration), so a second platform needs a second type.
struct CudaLaunchState : LaunchState {
  using LaunchState::LaunchState;
  static ffi::TypeId id;
};
ffi::TypeId CudaLaunchState::id = {};

ffi::Error ToXla(const std::exception& error) {
  const Failure* failure = dynamic_cast<const Failure*>(&error);
  bool invalid = failure != nullptr && failure->kind() == Failure::Kind::kInvalidArgument;
  return invalid ? ffi::Error::InvalidArgument(error.what()) : ffi::Error::Internal(error.what());
}

ffi::ErrorOr<std::unique_ptr<CudaLaunchState>> Instantiate(ffi::Dictionary attributes) {
  using U8 = ffi::Span<const uint8_t>;
  try {
    ffi::ErrorOr<U8> bytes = attributes.get<U8>("plan");
    if (!bytes.has_value()) return ffi::Unexpected(bytes.error());
    LaunchPlan plan = DecodePlan(bytes->begin(), bytes->size());
    for (size_t i = 0; i < plan.kernels.size(); ++i) {
      std::string name = "cubin" + std::to_string(i);
      if (!attributes.contains(name)) continue;
      ffi::ErrorOr<U8> cubin = attributes.get<U8>(name);
      if (!cubin.has_value()) return ffi::Unexpected(cubin.error());
      RegisterCubin(plan.kernels[i].digest, cubin->begin(), cubin->size());
    }
    return std::make_unique<CudaLaunchState>(std::move(plan));
  } catch (const std::exception& error) {
    return ffi::Unexpected(ToXla(error));
  }
}

ffi::Error Initialize(CudaLaunchState* state) {
  try {
    state->Load();
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ToXla(error);
  }
}

// Only to be early. XLA does not promise which context is current here, so errors are left to initialize.
ffi::Error Prepare(CudaLaunchState* state) {
  Initialize(state);
  return ffi::Error::Success();
}

// XLA gives one byte per element for packed types.
uint64_t SizeBytes(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::DataType::F4E2M1FN:
    case ffi::DataType::S4:
    case ffi::DataType::U4:
      return (buffer.element_count() + 1) / 2;
    case ffi::DataType::S2:
    case ffi::DataType::U2:
      return (buffer.element_count() + 3) / 4;
    default:
      return buffer.size_bytes();
  }
}

BufferView View(const ffi::AnyBuffer& buffer) { return {buffer.untyped_data(), SizeBytes(buffer)}; }

void ExecuteOrThrow(CudaLaunchState* state, CUstream stream, ffi::RemainingArgs operands,
                    ffi::RemainingRets results) {
  if (operands.size() > kMaxBuffers || results.size() > kMaxBuffers) {
    FailInvalid("a call has ", operands.size(), " operands and ", results.size(), " results, at most ",
                kMaxBuffers, " each.");
  }
  BufferViews buffers;
  buffers.num_operands = operands.size();
  buffers.num_results = results.size();
  for (size_t i = 0; i < operands.size(); ++i) {
    ffi::ErrorOr<ffi::AnyBuffer> operand = operands.get<ffi::AnyBuffer>(i);
    if (!operand.has_value()) FailInternal("operand ", i, ": ", operand.error().message());
    buffers.operands[i] = View(*operand);
  }
  for (size_t i = 0; i < results.size(); ++i) {
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> result = results.get<ffi::AnyBuffer>(i);
    if (!result.has_value()) FailInternal("result ", i, ": ", result.error().message());
    buffers.results[i] = View(**result);
  }
  state->Execute(stream, buffers);
}

ffi::Error Execute(CudaLaunchState* state, CUstream stream, ffi::RemainingArgs operands,
                   ffi::RemainingRets results) {
  using Clock = std::chrono::steady_clock;
  Clock::time_point start = Clock::now();
  try {
    ExecuteOrThrow(state, stream, operands, results);
  } catch (const std::exception& error) {
    return ToXla(error);
  }
  CountExecute(std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate, ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kPrepare, Prepare, ffi::Ffi::BindPrepare().Ctx<ffi::State<CudaLaunchState>>());
XLA_FFI_DEFINE_HANDLER(kInitialize, Initialize,
                       ffi::Ffi::BindInitialize().Ctx<ffi::State<CudaLaunchState>>());
XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<CudaLaunchState>>()
                           .Ctx<ffi::PlatformStream<CUstream>>()
                           .RemainingArgs()
                           .RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});

constexpr std::pair<const char*, XLA_FFI_Handler*> kHandlers[] = {
    {"instantiate", kInstantiate}, {"prepare", kPrepare}, {"initialize", kInitialize}, {"execute", kExecute}};

nb::dict Handlers() {
  nb::dict handlers;
  for (auto [stage, handler] : kHandlers) handlers[stage] = nb::capsule(reinterpret_cast<void*>(handler));
  return handlers;
}

nb::dict Type() {
  static XLA_FFI_TypeInfo info = ffi::MakeTypeInfo<CudaLaunchState>();
  nb::dict type;
  type["type_id"] = nb::capsule(static_cast<void*>(&CudaLaunchState::id));
  type["type_info"] = nb::capsule(static_cast<void*>(&info));
  return type;
}

// Asks a handler for its metadata, as XLA does when it is registered.
nb::dict Metadata(const std::string& stage) {
  for (auto [name, handler] : kHandlers) {
    if (name != stage) continue;
    // Without an XLA_FFI_Api the handler cannot report an error, and this is the one it could have.
    if (handler == kInstantiate && CudaLaunchState::id == XLA_FFI_UNKNOWN_TYPE_ID) {
      FailInternal("the state type is not registered: no CUDA backend has been started.");
    }
    XLA_FFI_Metadata metadata = {};
    metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
    XLA_FFI_Metadata_Extension extension = {};
    extension.extension_base.struct_size = XLA_FFI_Metadata_Extension_STRUCT_SIZE;
    extension.extension_base.type = XLA_FFI_Extension_Metadata;
    extension.metadata = &metadata;
    XLA_FFI_CallFrame frame = {};
    frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    frame.extension_start = &extension.extension_base;
    if (handler(&frame) != nullptr) FailInternal("stage ", name, " gives no metadata.");
    nb::dict out;
    out["api_version"] =
        nb::make_tuple(metadata.api_version.major_version, metadata.api_version.minor_version);
    out["command_buffer_compatible"] =
        (metadata.traits & XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE) != 0;
    return out;
  }
  FailInvalid("there is no stage ", stage, ".");
}

nb::dict ToPython(const BufferRef& buffer) {
  constexpr const char* kKinds[] = {"operand", "result", "scratch"};
  nb::dict out;
  out["kind"] = kKinds[static_cast<int>(buffer.kind)];
  out["index"] = buffer.index;
  out["byte_offset"] = buffer.byte_offset;
  return out;
}

nb::dict ToPython(const Scalar& scalar) {
  nb::dict out;
  out["scalar"] = static_cast<int>(scalar.type);
  out["bits"] = scalar.bits;
  return out;
}

template <typename Array>
nb::tuple Head(const Array& array, size_t n) {
  nb::list out;
  for (size_t i = 0; i < n; ++i) out.append(array[i]);
  return nb::tuple(out);
}

nb::dict ToPython(const TensorMap& map) {
  nb::dict out;
  out["buffer"] = ToPython(map.buffer);
  out["type"] = map.type;
  out["dims"] = Head(map.dims, map.rank);
  out["strides"] = Head(map.strides, map.rank - 1);
  out["box"] = Head(map.box, map.rank);
  out["swizzle"] = map.swizzle;
  out["l2_promotion"] = map.l2_promotion;
  out["fill"] = map.fill;
  return out;
}

nb::dict ToPython(const Launch& launch) {
  nb::list params;
  for (const Param& param : launch.params) {
    params.append(std::visit([](const auto& value) { return ToPython(value); }, param));
  }
  nb::dict out;
  out["kernel"] = launch.kernel;
  out["grid"] = Head(launch.grid, 3);
  out["block"] = launch.block;
  out["cluster"] = launch.cluster;
  out["shared_memory"] = launch.shared_memory;
  out["pdl"] = launch.pdl;
  out["cooperative"] = launch.cooperative;
  out["blocks_per_sm"] = launch.blocks_per_sm;
  out["params"] = params;
  return out;
}

nb::dict ToPython(const Memset& memset) {
  nb::dict out;
  out["buffer"] = ToPython(memset.buffer);
  out["num_bytes"] = memset.num_bytes;
  out["pattern"] = memset.pattern;
  out["pattern_bytes"] = memset.pattern_bytes;
  return out;
}

nb::dict ToPython(const Copy& copy) {
  nb::dict out;
  out["source"] = ToPython(copy.source);
  out["target"] = ToPython(copy.target);
  out["num_bytes"] = copy.num_bytes;
  return out;
}

LaunchPlan PlanFrom(const nb::bytes& bytes) {
  return DecodePlan(static_cast<const uint8_t*>(bytes.data()), bytes.size());
}

nb::dict Decode(nb::bytes bytes) {
  LaunchPlan plan = PlanFrom(bytes);
  nb::list kernels;
  for (const KernelRef& kernel : plan.kernels) {
    nb::dict entry;
    entry["name"] = kernel.name;
    entry["arch"] = kernel.arch;
    entry["digest"] = kernel.digest;
    kernels.append(entry);
  }
  nb::list steps;
  for (const Step& step : plan.steps) {
    steps.append(std::visit([](const auto& value) { return ToPython(value); }, step));
  }
  nb::dict out;
  out["version"] = plan.version;
  out["label"] = plan.label;
  out["kernels"] = kernels;
  out["scratch_bytes"] = Head(plan.scratch_bytes, plan.scratch_bytes.size());
  out["steps"] = steps;
  return out;
}

using AddressAndSize = std::pair<uintptr_t, uint64_t>;

BufferViews Views(const std::vector<AddressAndSize>& operands, const std::vector<AddressAndSize>& results) {
  BufferViews buffers;
  auto fill = [](const std::vector<AddressAndSize>& from, std::array<BufferView, kMaxBuffers>& to,
                 size_t& count) {
    if (from.size() > to.size()) FailInvalid(from.size(), " buffers, at most ", to.size(), ".");
    for (auto [address, size] : from) to[count++] = {reinterpret_cast<void*>(address), size};
  };
  fill(operands, buffers.operands, buffers.num_operands);
  fill(results, buffers.results, buffers.num_results);
  return buffers;
}

void CheckBuffers(nb::bytes plan, const std::vector<AddressAndSize>& operands,
                  const std::vector<AddressAndSize>& results) {
  LaunchState(PlanFrom(plan)).CheckBuffers(Views(operands, results));
}

// As XLA runs a call, on the null stream of the current context.
void RunPlan(nb::bytes plan, const std::vector<AddressAndSize>& operands,
             const std::vector<AddressAndSize>& results, int repeat) {
  LaunchState state(PlanFrom(plan));
  state.Load();
  for (int i = 0; i < repeat; ++i) state.Execute(nullptr, Views(operands, results));
}

nb::dict DriverInfoDict() {
  DriverInfo info = GetDriverInfo();
  nb::dict out;
  out["available"] = info.available;
  out["version"] = nb::make_tuple(info.version / 1000, info.version % 1000 / 10);
  out["error"] = info.error;
  return out;
}

nb::object FindCubinPath(const std::string& digest) {
  FoundCubin found = FindCubin(digest);
  return found.bytes == nullptr ? nb::none() : nb::object(nb::str(found.where.c_str()));
}

}  // namespace
}  // namespace jdg

NB_MODULE(_ffi, m) {
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const jdg::Failure& failure) {
      bool invalid = failure.kind() == jdg::Failure::Kind::kInvalidArgument;
      PyErr_SetString(invalid ? PyExc_ValueError : PyExc_RuntimeError, failure.what());
    }
  });

  m.doc() = "Native side of jax_deepgemm: one XLA custom call that executes launch plans.";
  m.attr("PLAN_VERSION") = jdg::kPlanVersion;
  m.attr("OLDEST_PLAN_VERSION") = jdg::kOldestPlanVersion;

  m.def("handlers", &jdg::Handlers, "Handler capsules by stage, for jax.ffi.register_ffi_target.");
  m.def("type", &jdg::Type, "State type, for jax.ffi.register_ffi_type, before the target.");
  m.def("metadata", &jdg::Metadata, nb::arg("stage"), "What the handler of a stage tells XLA about itself.");
  m.def(
      "register_cubin",
      [](const std::string& digest, nb::bytes data) {
        jdg::RegisterCubin(digest, static_cast<const uint8_t*>(data.data()), data.size());
      },
      nb::arg("digest"), nb::arg("data"), "Makes a cubin known to this process; checks its SHA-256.");
  m.def("set_cubin_directories", &jdg::SetCubinDirectories, nb::arg("directories"),
        "Where <digest>.cubin is looked for when this process has not compiled it.");
  m.def("cubin_directories", &jdg::CubinDirectories);
  m.def("find_cubin", &jdg::FindCubinPath, nb::arg("digest"), "'process', the path of the file, or None.");
  m.def("runs_on", &jdg::RunsOn, nb::arg("arch"), nb::arg("major"), nb::arg("minor"),
        "Whether code for `arch` runs on a compute capability.");
  m.def("decode", &jdg::Decode, nb::arg("plan"), "A launch plan's bytes as a dict; ValueError if malformed.");
  m.def("check_buffers", &jdg::CheckBuffers, nb::arg("plan"), nb::arg("operands"), nb::arg("results"),
        "Checks (address, size) pairs against a plan as its execution would; ValueError.");
  m.def("run", &jdg::RunPlan, nb::arg("plan"), nb::arg("operands"), nb::arg("results"), nb::arg("repeat") = 1,
        "Runs a plan on (address, size) pairs outside XLA, for tests.");
  m.def("driver_info", &jdg::DriverInfoDict, "Is libcuda there and which version; creates no context.");
  m.def("execute_count", [] { return jdg::GetExecuteCounters().count; }, "Executions of the handler so far.");
  m.def(
      "execute_nanoseconds", [] { return jdg::GetExecuteCounters().nanoseconds; },
      "Host time spent in them.");
  m.def("reset_execute_counters", &jdg::ResetExecuteCounters);
}
