// Norms and rotations of one token, and the router's choice.
#include <algorithm>
#include <cfloat>

#include "simd.h"
#include "table.h"

namespace NS {
namespace {

// Sixteen chains, then a tail: the order of a sum of n values that every norm uses.
template <class Value>
float ordered_sum(size_t n, Value value) {
  float lanes[LANES] = {};
  const size_t whole = n - n % LANES;
  for (size_t i = 0; i < whole; i += LANES) {
    for (size_t k = 0; k < LANES; ++k) lanes[k] += value(i + k);
  }
  float total = sum(F16::load(lanes));
  for (size_t i = whole; i < n; ++i) total += value(i);
  return total;
}

void rms_norm(const float* x, const float* w, float eps, size_t n, float* out) {
  const float mean = ordered_sum(n, [&](size_t i) { return x[i] * x[i]; }) / static_cast<float>(n);
  const float scale = 1.0f / std::sqrt(mean + eps);
  for (size_t i = 0; i < n; ++i) out[i] = x[i] * scale * w[i];
}

void layer_norm(const float* x, const float* w, const float* b, float eps, size_t n, float* out) {
  const float mean = ordered_sum(n, [&](size_t i) { return x[i]; }) / static_cast<float>(n);
  const float var = ordered_sum(n, [&](size_t i) { return (x[i] - mean) * (x[i] - mean); }) / static_cast<float>(n);
  const float scale = 1.0f / std::sqrt(var + eps);
  for (size_t i = 0; i < n; ++i) out[i] = (x[i] - mean) * scale * w[i] + b[i];
}

void widen_row(const uint16_t* x, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = widen(bf16{x[i]});
}

void rope(float* x, const float* cos, const float* sin, size_t pairs) {
  for (size_t i = 0; i < pairs; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

void route(const float* logits, const float* bias, size_t experts, size_t k, float scale, bool normalize, int32_t* ids,
           float* weights) {
  static thread_local Buffer<float> scratch;
  float* score = scratch.reserve(2 * experts);
  float* choice = score + experts;
  for (size_t e = 0; e < experts; ++e) {
    score[e] = sigmoid(logits[e]);
    // What is not a number comes first, so that it shows; and nothing is as small as what was chosen already.
    const float biased = score[e] + bias[e];
    choice[e] = std::isnan(biased) ? INFINITY : std::max(biased, -FLT_MAX);
  }
  float total = 0.0f;
  for (size_t i = 0; i < k; ++i) {
    size_t best = 0;
    for (size_t e = 1; e < experts; ++e) best = choice[e] > choice[best] ? e : best;
    ids[i] = static_cast<int32_t>(best);
    weights[i] = score[best];
    total += score[best];
    choice[best] = -INFINITY;
  }
  for (size_t i = 0; i < k; ++i) weights[i] = (normalize ? weights[i] / (total + 1e-20f) : weights[i]) * scale;
}

}  // namespace

extern const Norm norm;
const Norm norm = {rms_norm, layer_norm, widen_row, rope, route};

}  // namespace NS
