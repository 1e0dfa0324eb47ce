#ifndef JAX_DEEPGEMM_FFI_SHA256_H_
#define JAX_DEEPGEMM_FFI_SHA256_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace jdg {

// SHA-256 (FIPS 180-4) in lower-case hex: a cubin is what its name says, or it is not used.
std::string Sha256Hex(const uint8_t* data, size_t size);

}  // namespace jdg

#endif  // JAX_DEEPGEMM_FFI_SHA256_H_
