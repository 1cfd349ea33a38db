// The only file that knows Python: checks shapes and dtypes, releases the GIL, calls the table.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "pool.h"
#include "table.h"

namespace nb = nanobind;

namespace {

using Array = nb::ndarray<nb::ro, nb::device::cpu>;
using Output = nb::ndarray<nb::device::cpu>;

std::vector<const Table*> supported() {
  std::vector<const Table*> tables = {&base::table};
#ifdef GLM52_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables.push_back(&avx2::table);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      tables.push_back(&avx512::table);
    }
  }
#endif
  return tables;
}

const Table* choose() {
  const auto tables = supported();
  const char* wanted = std::getenv("GLM52_ISA");
  if (wanted == nullptr || *wanted == '\0') return tables.back();
  std::string names;
  for (const Table* t : tables) {
    if (std::string(wanted) == t->name) return t;
    names += std::string(names.empty() ? "" : ", ") + t->name;
  }
  throw std::runtime_error("GLM52_ISA: this CPU has " + names + ", found " + wanted);
}

const Table* table = nullptr;

template <class A>
void require(const char* name, const A& a, size_t ndim, bool dtype_ok, const char* dtypes) {
  if (a.ndim() != ndim) {
    throw nb::value_error((std::string(name) + ": expected " + std::to_string(ndim) + " dimensions, found " +
                           std::to_string(a.ndim()))
                              .c_str());
  }
  if (!dtype_ok) throw nb::value_error((std::string(name) + ": expected dtype " + dtypes).c_str());
  int64_t stride = 1;
  for (size_t i = ndim; i-- > 0;) {
    if (a.shape(i) != 1 && a.stride(i) != stride) {
      throw nb::value_error((std::string(name) + ": expected contiguous rows; call .contiguous()").c_str());
    }
    stride *= static_cast<int64_t>(a.shape(i));
  }
}

bool is_f32(nb::dlpack::dtype t) { return t == nb::dtype<float>(); }
bool is_bf16(nb::dlpack::dtype t) {
  return t.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && t.bits == 16 && t.lanes == 1;
}

void linear(Array x, Array w, Output y, size_t threads) {
  require("x", x, 2, is_f32(x.dtype()), "float32");
  require("w", w, 2, is_f32(w.dtype()) || is_bf16(w.dtype()), "float32 or bfloat16");
  require("y", y, 2, is_f32(y.dtype()), "float32");
  if (w.shape(1) != x.shape(1) || y.shape(0) != x.shape(0) || y.shape(1) != w.shape(0)) {
    throw nb::value_error(("w, y: expected [N, " + std::to_string(x.shape(1)) + "] and [" + std::to_string(x.shape(0)) +
                           ", N], found w " + std::to_string(w.shape(0)) + " x " + std::to_string(w.shape(1)) + ", y " +
                           std::to_string(y.shape(0)) + " x " + std::to_string(y.shape(1)))
                              .c_str());
  }
  const LinearArgs args = {static_cast<const float*>(x.data()), w.data(), static_cast<float*>(y.data()),
                           x.shape(0), w.shape(0), x.shape(1)};
  const auto body = is_f32(w.dtype()) ? table->linear_f32 : table->linear_bf16;
  const nb::gil_scoped_release unlocked;
  parallel_for(args.rows, 16, threads, [&](size_t begin, size_t end) { body(args, begin, end); });
}

}  // namespace

NB_MODULE(_kernels, m) {
  table = choose();
  m.def("isa", [] { return std::string(table->name); }, "The instruction set in use.");
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Table* t : supported()) names.emplace_back(t->name);
    return names;
  }, "Every instruction set of this build that this CPU has, the widest last.");
  m.def("linear", &linear, nb::arg("x"), nb::arg("w"), nb::arg("y").noconvert(), nb::arg("threads"),
        "y = x w^T. x f32 [T, D], w f32 or bf16 [N, D], y f32 [T, N], all contiguous. ValueError names what is wrong.");
}
