// The one error type inside the module. Handlers turn it into an XLA error, Python functions into ValueError
// or RuntimeError; nothing else is thrown on purpose.

#ifndef JAX_DEEPGEMM_FFI_FAILURE_H_
#define JAX_DEEPGEMM_FFI_FAILURE_H_

#include <sstream>
#include <stdexcept>
#include <string>

namespace jdg {

class Failure : public std::runtime_error {
 public:
  enum class Kind { kInvalidArgument, kInternal };

  Failure(Kind kind, const std::string& message)
      : std::runtime_error("jax_deepgemm: " + message), kind_(kind) {}

  Kind kind() const { return kind_; }

 private:
  Kind kind_;
};

template <typename... Parts>
std::string Concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <typename... Parts>
[[noreturn]] void FailInvalid(const Parts&... parts) {
  throw Failure(Failure::Kind::kInvalidArgument, Concat(parts...));
}

template <typename... Parts>
[[noreturn]] void FailInternal(const Parts&... parts) {
  throw Failure(Failure::Kind::kInternal, Concat(parts...));
}

}  // namespace jdg

#endif  // JAX_DEEPGEMM_FFI_FAILURE_H_
