// A weight matrix as the kernels read it, and activations as they take them. Knows layouts, no instruction set.
//
// Rows come in panels of 16, one lane each; along a row four values make a step, in int4 eight. Four panels make a
// block, whose steps take turns, so that a block is one stream of memory. A product with one token or with twelve walks
// it in the same order, and no sum is ever taken across lanes.
//
//   block:  step 0 of panels 0 1 2 3 | step 1 of panels 0 1 2 3 | ...     (the last block may hold fewer panels)
//   step:   bf16, fp8: 16 rows x 4 values, in pairs (see formats.h)
//           int8: the 4 values of row 0, of row 1, ..., each plus 128
//           int4: the same with values 0 to 3 in the low and 4 to 7 in the high halves, each plus 8
//   scales: after the steps of each group, 16 floats of panel 0, of panel 1, ...; value = scale * what the step decodes
//           to. Where int4 has zero points, a panel's scales are followed by its 16 zeros as bytes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

constexpr size_t PANEL = 16;
constexpr size_t STEP = 4;
constexpr size_t INT4_STEP = 2 * STEP;
constexpr size_t BLOCK = 4;  // panels

inline size_t round_up(size_t n, size_t m) { return (n + m - 1) / m * m; }

// What the system may map with one entry of the page tables; virtual machines walk two tables for each missing one.
constexpr size_t HUGE_PAGE = size_t{1} << 21;

// On a cache line's border; whole huge pages in it are asked for. For ``std::free``.
inline void* allocate(size_t bytes) {
  const bool huge = bytes >= HUGE_PAGE;
  const size_t border = huge ? HUGE_PAGE : 64;
  void* p = std::aligned_alloc(border, round_up(bytes, border));
  if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (huge) madvise(p, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
  return p;
}

// Memory that only ever grows; its content is lost when it does.
template <class T>
class Buffer {
 public:
  T* reserve(size_t count) {
    if (count > size_) {
      data_.reset();
      data_.reset(static_cast<T*>(allocate(count * sizeof(T))));
      size_ = count;
    }
    return data_.get();
  }
  T* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  size_t size_ = 0;
};

enum class Format { f32, bf16, int8, int4, fp8 };

// What a product of weights rounds activations to: floats, bfloat16, or 16-bit integers that share a power of two.
enum class Rounding { f32, bf16, fixed };

inline bool is_integer(Format f) { return f == Format::int8 || f == Format::int4; }
inline bool is_scaled(Format f) { return f == Format::fp8 || is_integer(f); }
inline Rounding rounding_of(Format f) {
  return f == Format::f32 ? Rounding::f32 : is_integer(f) ? Rounding::fixed : Rounding::bf16;
}

// Where value i of an fp8 step (in the order of the pairs) lies among its bytes: eight values of the first pairs, eight
// of the second, and so on, so that unpacking needs no shuffle between quarters.
constexpr size_t byte_place(size_t i) { return i % 32 / 8 * 16 + i / 32 * 8 + i % 8; }

// Values and bytes of one step of a panel.
inline size_t step_values(Format f) { return f == Format::int4 ? INT4_STEP : STEP; }
inline size_t step_bytes(Format f) {
  const size_t values = PANEL * STEP;
  return f == Format::f32 ? 4 * values : f == Format::bf16 ? 2 * values : values;
}

// Integers are kept plus an offset. A zero z of int4, -8 to 8, is kept as ZERO_POINT - z.
constexpr int INT8_OFFSET = 128, INT4_OFFSET = 8, ZERO_POINT = 8;
// Groups of integers begin at multiples of this.
constexpr size_t INTEGER_GROUP = 32;

// Where things lie in a block of `count` panels, in bytes: `stride` lie between two steps of a panel. Where there are
// scales, `group_steps` steps share those after them, `scale_bytes` for each panel.
struct BlockLayout {
  size_t count, stride, steps, group_steps, scale_bytes;

  // From a panel's first step to its step s, which lies in that group.
  size_t step(size_t s, size_t group) const { return s * stride + group * count * scale_bytes; }
  // From the block's begin to panel p's scales.
  size_t scales(size_t p, size_t group) const {
    return std::min((group + 1) * group_steps, steps) * stride + (group * count + p) * scale_bytes;
  }
};

struct Matrix {
  Format format = Format::f32;
  size_t rows = 0, depth = 0;
  size_t group = 0;    // values that share a scale; 0 without scales
  bool zeros = false;  // int4 with a zero point beside each scale
  std::shared_ptr<uint8_t> data;

  size_t panels() const { return (rows + PANEL - 1) / PANEL; }
  size_t steps() const { return (depth + step_values(format) - 1) / step_values(format); }
  size_t group_steps() const { return group ? (group + step_values(format) - 1) / step_values(format) : steps(); }
  size_t groups() const { return group ? (depth + group - 1) / group : 0; }
  size_t panel_bytes() const { return steps() * step_bytes(format) + groups() * scale_bytes(); }
  // What a panel holds for each group besides its steps.
  size_t scale_bytes() const { return group ? PANEL * sizeof(float) + (zeros ? PANEL : 0) : 0; }
  size_t bytes() const { return panels() * panel_bytes(); }
  // The block that begins with panel p, a multiple of BLOCK.
  uint8_t* block(size_t p) const { return data.get() + p * panel_bytes(); }
  size_t block_panels(size_t p) const { return std::min(BLOCK, panels() - p); }
  BlockLayout layout(size_t p) const {
    return {block_panels(p), block_panels(p) * step_bytes(format), steps(), group_steps(), scale_bytes()};
  }
};
