#pragma once

#include <memory>

#include "matrix.h"

// A matrix by rows: float, bfloat16 (as uint16), int8 (also for int4, -8 to 7) or E4M3 (as uint8), and a scale for each
// `group` values of each `scale_rows` rows: scales [ceil(rows / scale_rows), ceil(depth / group)]. zeros, of that shape
// too, -8 to 8, or null: value = scale * (data - zero).
struct Source {
  Format format;
  const void* data;
  size_t rows, depth;
  const float* scales;
  const int8_t* zeros;
  size_t group, scale_rows;
  size_t threads;
};

std::shared_ptr<Matrix> pack(const Source& s);
