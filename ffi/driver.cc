#include "driver.h"

#include <dlfcn.h>

#include "failure.h"

namespace jdg {
namespace {

struct Loaded {
  Driver driver;
  std::string error;
};

// Two levels, so that names which cuda.h maps to versioned symbols are looked up by those.
#define JDG_QUOTE(text) #text
#define JDG_SYMBOL(name) JDG_QUOTE(name)

Loaded Load() {
  Loaded loaded;
  void* handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* why = dlerror();
    loaded.error = Concat("the NVIDIA driver library is not there (", why == nullptr ? "libcuda.so.1" : why,
                          "). Install the driver, or run on another platform: every op has a CPU form");
    return loaded;
  }
  Driver& driver = loaded.driver;
#define JDG_OPEN(name) driver.name = reinterpret_cast<decltype(driver.name)>(dlsym(handle, JDG_SYMBOL(name)));
  JDG_DRIVER_FUNCTIONS(JDG_OPEN)
  JDG_OPTIONAL_DRIVER_FUNCTIONS(JDG_OPEN)
#undef JDG_OPEN
#define JDG_REQUIRE(name) \
  if (driver.name == nullptr && loaded.error.empty()) loaded.error = "libcuda.so.1 has no " #name;
  JDG_DRIVER_FUNCTIONS(JDG_REQUIRE)
#undef JDG_REQUIRE
  if (!loaded.error.empty()) loaded.error += ": the driver is older than CUDA 12.0. Update it";
  return loaded;
}

const Loaded& LoadOnce() {
  static const Loaded* loaded = new Loaded(Load());
  return *loaded;
}

}  // namespace

const Driver& Driver::Get() {
  const Loaded& loaded = LoadOnce();
  if (!loaded.error.empty()) FailInternal(loaded.error, ".");
  return loaded.driver;
}

void Driver::Fail(CUresult result, const std::string& what) const {
  const char* name = nullptr;
  const char* text = nullptr;
  cuGetErrorName(result, &name);
  cuGetErrorString(result, &text);
  FailInternal(what, ": ", name == nullptr ? "CUDA error" : name, " (", static_cast<int>(result), "), ",
               text == nullptr ? "no description" : text, ".");
}

DriverInfo GetDriverInfo() {
  const Loaded& loaded = LoadOnce();
  DriverInfo info;
  info.error = loaded.error;
  if (loaded.driver.cuDriverGetVersion != nullptr) loaded.driver.cuDriverGetVersion(&info.version);
  info.available = info.error.empty();
  return info;
}

}  // namespace jdg
