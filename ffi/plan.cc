#include "plan.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "failure.h"

namespace jdg {
namespace {

constexpr uint64_t kMaxBytes = uint64_t{1} << 48;

class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  size_t position() const { return position_; }
  size_t left() const { return size_ - position_; }

  const uint8_t* Bytes(size_t n, const char* what) {
    if (n > left()) Fail(what, " needs ", n, " bytes and ", left(), " are left");
    const uint8_t* start = data_ + position_;
    position_ += n;
    return start;
  }

  template <typename T>
  T Get(const char* what) {
    static_assert(std::is_unsigned_v<T>);
    const uint8_t* bytes = Bytes(sizeof(T), what);
    T value = 0;
    for (size_t i = 0; i < sizeof(T); ++i) value |= static_cast<T>(static_cast<T>(bytes[i]) << (8 * i));
    return value;
  }

  template <typename T>
  T Get(const char* what, uint64_t low, uint64_t high) {
    T value = Get<T>(what);
    if (value < low || value > high) Fail(what, " is ", uint64_t{value}, ", need ", low, " to ", high);
    return value;
  }

  template <typename Length>
  std::string Text(const char* what, size_t limit) {
    size_t n = Get<Length>(what, 0, limit);
    const uint8_t* bytes = Bytes(n, what);
    return std::string(reinterpret_cast<const char*>(bytes), n);
  }

  template <typename... Parts>
  [[noreturn]] void Fail(const Parts&... parts) const {
    FailInvalid("malformed launch plan (", size_, " bytes) at byte ", position_, ": ", parts...,
                ". Was it written by another version of the package, or damaged? Trace and compile again.");
  }

 private:
  const uint8_t* data_;
  size_t size_;
  size_t position_ = 0;
};

bool IsIdentifier(std::string_view text) {
  auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; };
  auto digit = [](char c) { return c >= '0' && c <= '9'; };
  return !text.empty() && letter(text[0]) &&
         std::all_of(text.begin(), text.end(), [&](char c) { return letter(c) || digit(c); });
}

bool IsArch(std::string_view text) {
  if (!text.empty() && (text.back() == 'a' || text.back() == 'f')) text.remove_suffix(1);
  return (text.size() == 2 || text.size() == 3) &&
         std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

// Labels end up in error messages, which Python decodes.
bool IsUtf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    uint8_t lead = text[i++];
    if (lead < 0x80) continue;
    size_t more = lead >= 0xf0 ? 3 : lead >= 0xe0 ? 2 : 1;
    if (lead < 0xc2 || lead > 0xf4 || more > text.size() - i) return false;
    uint32_t code = lead & (0x3f >> more);
    for (size_t end = i + more; i < end; ++i) {
      if ((text[i] & 0xc0) != 0x80) return false;
      code = code << 6 | (text[i] & 0x3f);
    }
    constexpr uint32_t kSmallest[] = {0, 0x80, 0x800, 0x10000};
    if (code < kSmallest[more] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return false;
  }
  return true;
}

std::string Hex(const uint8_t* bytes, size_t n) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (size_t i = 0; i < n; ++i) {
    out += kDigits[bytes[i] >> 4];
    out += kDigits[bytes[i] & 15];
  }
  return out;
}

KernelRef ReadKernel(Reader& in) {
  KernelRef kernel;
  kernel.digest = Hex(in.Bytes(32, "kernel digest"), 32);
  kernel.arch = in.Text<uint8_t>("kernel arch", 4);
  if (!IsArch(kernel.arch)) in.Fail("kernel arch is not a compute capability");
  kernel.name = in.Text<uint16_t>("kernel name", 512);
  if (!IsIdentifier(kernel.name)) in.Fail("kernel name is not an identifier");
  return kernel;
}

BufferRef ReadBuffer(Reader& in, const LaunchPlan& plan) {
  constexpr uint8_t kPeer = 3;
  BufferRef buffer;
  uint8_t kind = in.Get<uint8_t>("buffer kind", 0, plan.version < 3 ? 2 : kPeer);
  if (kind == kPeer)
    in.Fail("buffer kind 3, memory of another GPU, is reserved, and this version cannot use it");
  buffer.kind = static_cast<BufferKind>(kind);
  buffer.index = in.Get<uint16_t>("buffer index", 0, kMaxBuffers - 1);
  buffer.byte_offset = in.Get<uint64_t>("buffer offset", 0, kMaxBytes);
  buffer.needed_bytes = buffer.byte_offset;
  if (buffer.kind == BufferKind::kScratch && buffer.index >= plan.scratch_bytes.size()) {
    in.Fail("scratch ", buffer.index, " of ", plan.scratch_bytes.size());
  }
  return buffer;
}

// Extents are sums of products below 2^32 * 2^40; saturate instead of wrapping.
uint64_t ExtentBytes(const TensorMap& map) {
  constexpr uint64_t kHuge = uint64_t{1} << 62;
  uint64_t extent = map.dims[0] * FindTensorType(map.type)->bits / 8;
  for (size_t i = 1; i < map.rank; ++i) {
    uint64_t steps = map.dims[i] - 1;
    uint64_t stride = map.strides[i - 1];
    if (stride != 0 && steps > kHuge / stride) return kHuge;
    extent = std::min(kHuge, extent + steps * stride);
  }
  return extent;
}

TensorMap ReadTensorMap(Reader& in, const LaunchPlan& plan) {
  TensorMap map;
  map.buffer = ReadBuffer(in, plan);
  map.type = in.Get<uint8_t>("tensor map type");
  const TensorType* type = FindTensorType(map.type, plan.version);
  if (type == nullptr) in.Fail("unknown tensor map type ", int{map.type});
  if (map.buffer.byte_offset % type->alignment != 0) {
    in.Fail("tensor map offset ", map.buffer.byte_offset, " is not a multiple of ", type->alignment);
  }
  map.rank = in.Get<uint8_t>("tensor map rank", 1, kMaxRank);
  map.swizzle = in.Get<uint8_t>("tensor map swizzle", 0, 3);
  map.l2_promotion = in.Get<uint8_t>("tensor map L2 promotion", 0, 3);
  map.fill = in.Get<uint8_t>("tensor map fill", 0, 1);
  if (map.fill == 1 && !type->floating) in.Fail("NaN fill of an integer tensor map");
  for (size_t i = 0; i < map.rank; ++i)
    map.dims[i] = in.Get<uint64_t>("tensor map dim", 1, uint64_t{1} << 32);
  if (map.dims[0] % type->dim_multiple != 0) {
    in.Fail("tensor map dim ", map.dims[0], " is not a multiple of ", type->dim_multiple);
  }
  for (size_t i = 0; i + 1 < map.rank; ++i) {
    map.strides[i] = in.Get<uint64_t>("tensor map stride", 0, (uint64_t{1} << 40) - 16);
    if (map.strides[i] % type->alignment != 0) {
      in.Fail("tensor map stride ", map.strides[i], " is not a multiple of ", type->alignment);
    }
  }
  for (size_t i = 0; i < map.rank; ++i) map.box[i] = in.Get<uint32_t>("tensor map box", 1, 256);
  uint32_t inner_bits = map.box[0] * type->bits;
  if (inner_bits % 128 != 0)
    in.Fail("tensor map box row of ", inner_bits / 8, " bytes is not a multiple of 16");
  if (map.swizzle != 0 && inner_bits / 8 > (16u << map.swizzle))
    in.Fail("tensor map box row is wider than its swizzle");
  if (map.type == kSpaced4 && (map.box[0] != 128 || (map.swizzle != 0 && map.swizzle != 3)))
    in.Fail("a tensor map of spaced 4-bit elements needs a box row of 128, and swizzle 0 or 128");
  map.buffer.needed_bytes += ExtentBytes(map);
  return map;
}

Scalar ReadScalar(Reader& in) {
  Scalar scalar;
  scalar.type = static_cast<ScalarType>(in.Get<uint8_t>("scalar type", 1, 5));
  scalar.bits = in.Get<uint64_t>("scalar");
  return scalar;
}

Param ReadParam(Reader& in, const LaunchPlan& plan) {
  switch (in.Get<uint8_t>("parameter tag", 1, 3)) {
    case 1:
      return ReadBuffer(in, plan);
    case 2:
      return ReadScalar(in);
    default:
      return ReadTensorMap(in, plan);
  }
}

Launch ReadLaunch(Reader& in, const LaunchPlan& plan) {
  Launch launch;
  launch.kernel = in.Get<uint16_t>("kernel index");
  if (launch.kernel >= plan.kernels.size()) in.Fail("kernel ", launch.kernel, " of ", plan.kernels.size());
  launch.grid[0] = in.Get<uint32_t>("grid x", 1, 0x7fffffff);
  launch.grid[1] = in.Get<uint32_t>("grid y", 1, 65535);
  launch.grid[2] = in.Get<uint32_t>("grid z", 1, 65535);
  launch.block = in.Get<uint32_t>("block", 1, 1024);
  launch.cluster = in.Get<uint32_t>("cluster", 1, 16);
  if (launch.grid[0] % launch.cluster != 0) in.Fail("grid x is not a multiple of the cluster");
  launch.shared_memory = in.Get<uint32_t>("shared memory", 0, 1 << 20);
  uint8_t flags = in.Get<uint8_t>("launch flags", 0, plan.version < 3 ? 1 : 3);
  launch.pdl = (flags & 1) != 0;
  launch.cooperative = (flags & 2) != 0;
  size_t count = in.Get<uint16_t>("parameter count", 0, kMaxParams);
  size_t tensor_maps = 0;
  for (size_t i = 0; i < count; ++i) {
    launch.params.push_back(ReadParam(in, plan));
    tensor_maps += std::holds_alternative<TensorMap>(launch.params.back());
  }
  if (tensor_maps > kMaxTensorMaps) in.Fail(tensor_maps, " tensor maps, at most ", kMaxTensorMaps);
  if (plan.version >= 3) launch.blocks_per_sm = in.Get<uint16_t>("blocks per SM", 0, kMaxBlocksPerSm);
  return launch;
}

template <typename Pattern>
Memset ReadMemset(Reader& in, const LaunchPlan& plan) {
  Memset memset;
  memset.buffer = ReadBuffer(in, plan);
  if (memset.buffer.kind == BufferKind::kOperand) in.Fail("memset of an operand");
  memset.num_bytes = in.Get<uint64_t>("memset size", 1, kMaxBytes);
  memset.pattern_bytes = sizeof(Pattern);
  memset.pattern = in.Get<Pattern>("memset pattern");
  if (memset.num_bytes % sizeof(Pattern) != 0 || memset.buffer.byte_offset % sizeof(Pattern) != 0) {
    in.Fail("memset of ", memset.num_bytes, " bytes, ", memset.buffer.byte_offset,
            " bytes in, with a pattern of ", sizeof(Pattern));
  }
  memset.buffer.needed_bytes += memset.num_bytes;
  return memset;
}

Copy ReadCopy(Reader& in, const LaunchPlan& plan) {
  Copy copy;
  copy.source = ReadBuffer(in, plan);
  copy.target = ReadBuffer(in, plan);
  if (copy.target.kind == BufferKind::kOperand) in.Fail("copy into an operand");
  copy.num_bytes = in.Get<uint64_t>("copy size", 1, kMaxBytes);
  copy.source.needed_bytes += copy.num_bytes;
  copy.target.needed_bytes += copy.num_bytes;
  return copy;
}

Step ReadStep(Reader& in, const LaunchPlan& plan) {
  switch (in.Get<uint8_t>("step tag", 1, plan.version + 1)) {  // every version so far has added one
    case 1:
      return ReadLaunch(in, plan);
    case 2:
      return ReadMemset<uint8_t>(in, plan);
    case 3:
      return ReadCopy(in, plan);
    default:
      return ReadMemset<uint32_t>(in, plan);
  }
}

}  // namespace

LaunchPlan DecodePlan(const uint8_t* data, size_t size) {
  Reader in(data, size);
  if (std::memcmp(in.Bytes(4, "magic"), "JDGP", 4) != 0) in.Fail("it does not begin with JDGP");
  LaunchPlan plan;
  plan.version = in.Get<uint16_t>("version", kOldestPlanVersion, kPlanVersion);
  in.Get<uint16_t>("reserved field", 0, 0);
  if (in.Get<uint32_t>("size") != size) in.Fail("its header gives another size");
  plan.label = in.Text<uint16_t>("label", 1024);
  if (!IsUtf8(plan.label)) in.Fail("the label is not UTF-8");
  size_t kernels = in.Get<uint16_t>("kernel count", 0, kMaxSteps);
  for (size_t i = 0; i < kernels; ++i) plan.kernels.push_back(ReadKernel(in));
  size_t scratch = in.Get<uint16_t>("scratch count", 0, kMaxScratch);
  for (size_t i = 0; i < scratch; ++i)
    plan.scratch_bytes.push_back(in.Get<uint64_t>("scratch size", 1, kMaxBytes));
  size_t steps = in.Get<uint16_t>("step count", 1, kMaxSteps);
  for (size_t i = 0; i < steps; ++i) plan.steps.push_back(ReadStep(in, plan));
  if (in.left() != 0) in.Fail(in.left(), " bytes follow the last step");
  return plan;
}

const TensorType* FindTensorType(uint8_t type, uint16_t version) {
  static constexpr TensorType kTypes[] = {{8, false},  {16, false},       {32, false},        {32, false},
                                          {64, false}, {64, false},       {16, true},         {32, true},
                                          {64, true},  {16, true},        {32, true},         {32, true},
                                          {32, true},  {4, false, 16, 2}, {4, false, 32, 128}};
  size_t known = version < 3 ? 10 : std::size(kTypes);
  return type < known ? &kTypes[type] : nullptr;
}

std::string BufferName(const BufferRef& buffer) {
  constexpr const char* kNames[] = {"operand ", "result ", "scratch "};
  return Concat(kNames[static_cast<int>(buffer.kind)], buffer.index);
}

}  // namespace jdg
