// The one product of panels and tiles that every kernel is built from.
#pragma once

#include "formats.h"

namespace NS {

// out[p][t] = sum over k of panel p [row, k] * x[k, t], one row in each lane; `stride` bytes lie between two steps. k
// runs upwards in one chain for each element, whatever P and T are; formats with scales close a chain at the end of
// every group.
template <class F, int P, int T>
inline void multiply(const uint8_t* const (&panel)[P], size_t stride, const float* const (&scale)[P],
                     size_t scale_stride, size_t steps, size_t group, const typename F::Activation* x,
                     F16 (&out)[P][T]) {
  for (int p = 0; p < P; ++p) {
    for (int t = 0; t < T; ++t) out[p][t] = F16::zero();
  }
  const size_t in_group = F::scaled ? group / STEP : steps;
  for (size_t step = 0, g = 0; step < steps; ++g) {
    const size_t end = step + in_group < steps ? step + in_group : steps;
    F16 acc[P][T];
    for (int p = 0; p < P; ++p) {
      for (int t = 0; t < T; ++t) acc[p][t] = F16::zero();
    }
    for (; step < end; ++step, x += STEP * T) {
      if constexpr (F::format == Format::f32) {
        for (size_t k = 0; k < STEP; ++k) {
          F16 w[P];
          for (int p = 0; p < P; ++p)
            w[p] = F16::load(reinterpret_cast<const float*>(panel[p] + step * stride) + k * LANES);
          for (int t = 0; t < T; ++t) {
            const F16 b = F16::all(x[k * T + t]);
            for (int p = 0; p < P; ++p) acc[p][t].fma(w[p], b);
          }
        }
      } else {
        Step w[P];
        for (int p = 0; p < P; ++p) w[p] = load_step<F>(panel[p] + step * stride, scale[p] + g * scale_stride);
        for (int half = 0; half < 2; ++half) {
          for (int t = 0; t < T; ++t) {
            const Pairs b = Pairs::all(x + (half * T + t) * 2);
            for (int p = 0; p < P; ++p) Pairs::dot(acc[p][t], w[p].pairs[half], b);
          }
        }
      }
    }
    for (int p = 0; p < P; ++p) {
      for (int t = 0; t < T; ++t) {
        if constexpr (F::scaled) {
          out[p][t].fma(acc[p][t], F16::load(scale[p] + g * scale_stride));
        } else {
          out[p][t] = acc[p][t];
        }
      }
    }
  }
}

}  // namespace NS
