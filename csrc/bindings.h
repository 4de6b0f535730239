// What the parts of the extension module share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/clips.h"
#include "core/view.h"

namespace fastskel {

// ValueError in the library's form: what must be, what is, and what to do
void require(bool ok, const char* function, const char* argument, const std::string& contract, const std::string& actual,
             const char* remedy);

// Calls without the GIL. It is taken back outside of any destructor: in a thread that outlives the interpreter, that call
// ends the thread by unwinding its stack (up to Python 3.13), which a destructor would turn into the end of the process.
template <typename Call>
void without_gil(const Call& call) {
  std::exception_ptr thrown;
  PyThreadState* state = PyEval_SaveThread();
  try {
    call();
  } catch (...) {
    thrown = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (thrown) std::rethrow_exception(thrown);
}

// the program of a view from its description in Python (`fastskel.data.program`)
ViewProgram program_from(const pybind11::dict& description);
DType dtype_from(const std::string& name);

// clips of a view and its mask
using Views = std::vector<std::pair<pybind11::array, pybind11::array>>;

// the views of a data set, ready to be made; `clips` is kept alive by the object that holds this one
class ViewMakers {
 public:
  // `numbers` are those of the views' draws: 0, 1, .. where there are none
  ViewMakers(const Clips& clips, const std::vector<pybind11::dict>& programs, std::uint64_t seed, const std::string& dtype,
             const std::optional<std::vector<std::uint32_t>>& numbers);

  const Clips& clips() const noexcept { return *clips_; }
  const std::vector<ViewMaker>& makers() const noexcept { return makers_; }
  DType type() const noexcept { return type_; }
  // what NumPy has for the type: bits of a bfloat16 are a uint16
  pybind11::dtype array_type() const;
  // shape (N, T, M, V, C) of a view
  std::vector<pybind11::ssize_t> shape(std::size_t view, pybind11::ssize_t rows) const;
  // all views of clips (N,), made in this thread
  Views make(std::int64_t epoch, const pybind11::array& index) const;

 private:
  const Clips* clips_;
  std::vector<ViewMaker> makers_;
  DType type_;
};

void bind_formats(pybind11::module_& module);
void bind_views(pybind11::module_& module);
void bind_stream(pybind11::module_& module);

}  // namespace fastskel
