// Arithmetic that does not depend on what the calling thread was told.
#pragma once

#include <cfenv>

namespace fastskel {

// in its block numbers are rounded to nearest and those below the normal ones kept. torch.set_flush_denormal makes the thread
// that calls it, and every thread that one starts, take them for zeros
class DefaultFloats {
 public:
  DefaultFloats() noexcept {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloats() { std::fesetenv(&before_); }
  DefaultFloats(const DefaultFloats&) = delete;
  DefaultFloats& operator=(const DefaultFloats&) = delete;

 private:
  std::fenv_t before_;
};

}  // namespace fastskel
