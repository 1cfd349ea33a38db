// What every instruction set offers, as a table of functions; bind.cpp picks one table when the extension is imported.
#pragma once

#include <cstddef>

// y[t, n] = sum over d of x[t, d] * w[n, d], for rows n in [begin, end). x, y and the sums are float; w is float or
// bfloat16. The order of the sum over d is fixed: an element's bits depend on its row of x and of w and on nothing else.
struct LinearArgs {
  const float* x;
  const void* w;
  float* y;
  size_t tokens, rows, depth;
};

struct Table {
  const char* name;
  void (*linear_f32)(const LinearArgs&, size_t begin, size_t end);
  void (*linear_bf16)(const LinearArgs&, size_t begin, size_t end);
};

namespace base {
extern const Table table;
}
namespace avx2 {
extern const Table table;
}
namespace avx512 {
extern const Table table;
}
