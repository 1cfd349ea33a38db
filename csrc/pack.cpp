// From rows as a checkpoint holds them to panels.
#include "pack.h"

#include <cstring>
#include <mutex>
#include <stdexcept>

#include "pool.h"

namespace {

// Where row r, value k stands in a step of pairs: (0, 1) of all rows, then (2, 3).
size_t pair_place(size_t r, size_t k) { return k / 2 * 2 * PANEL + 2 * r + k % 2; }

template <class T>
void pack_panel(const Source& s, Matrix& m, size_t p) {
  const size_t values = step_values(m.format), live = std::min(PANEL, m.rows - p * PANEL), in_block = p % BLOCK;
  const BlockLayout layout = m.layout(p - in_block);
  uint8_t* panel = m.block(p - in_block) + in_block * step_bytes(m.format);
  for (size_t i = 0; i < layout.steps; ++i) {
    uint8_t* step = panel + layout.step(i, i / layout.group_steps);
    std::memset(step, 0, step_bytes(m.format));
    const size_t first = i * values, count = std::min(values, m.depth - first);
    for (size_t r = 0; r < live; ++r) {
      const T* row = static_cast<const T*>(s.data) + (p * PANEL + r) * m.depth + first;
      for (size_t k = 0; k < count; ++k) {
        uint8_t& byte = step[r * STEP + k % STEP];
        if (m.format == Format::int4)
          byte = static_cast<uint8_t>(byte | (static_cast<int>(row[k]) + INT4_OFFSET) << (k < STEP ? 0 : 4));
        else if (m.format == Format::int8)
          byte = static_cast<uint8_t>(static_cast<int>(row[k]) + INT8_OFFSET);
        else if (m.format == Format::fp8)
          step[byte_place(pair_place(r, k))] = static_cast<uint8_t>(row[k]);
        else
          reinterpret_cast<T*>(step)[m.format == Format::f32 ? k * PANEL + r : pair_place(r, k)] = row[k];
      }
    }
  }
}

void pack_scales(const Source& s, Matrix& m, size_t p) {
  const size_t in_block = p % BLOCK;
  for (size_t g = 0; g < m.groups(); ++g) {
    uint8_t* out = m.block(p - in_block) + m.layout(p - in_block).scales(in_block, g);
    for (size_t r = 0; r < PANEL; ++r) {
      const size_t row = p * PANEL + r, from = row / s.scale_rows * m.groups() + g;
      const float scale = row < m.rows ? s.scales[from] : 0.0f;
      std::memcpy(out + r * sizeof scale, &scale, sizeof scale);
      if (s.zeros) out[PANEL * sizeof scale + r] = static_cast<uint8_t>(row < m.rows ? ZERO_POINT - s.zeros[from] : 0);
    }
  }
}

// Pieces smaller than a huge page lie side by side in a few of them; the last to go frees the memory.
std::shared_ptr<uint8_t> share(size_t bytes) {
  const auto fresh = [](size_t size) {
    return std::shared_ptr<uint8_t>(static_cast<uint8_t*>(allocate(size)), std::free);
  };
#ifndef __SANITIZE_ADDRESS__  // which sees the ends of an allocation, not of a piece
  constexpr size_t TOGETHER = 4 * HUGE_PAGE;
  if (bytes < HUGE_PAGE) {
    static std::mutex one_at_a_time;
    static std::shared_ptr<uint8_t> memory;
    static size_t used = TOGETHER;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    if (used + bytes > TOGETHER) {
      memory = fresh(TOGETHER);
      used = 0;
    }
    const std::shared_ptr<uint8_t> piece(memory, memory.get() + used);
    used += round_up(bytes, 64);
    return piece;
  }
#endif
  return fresh(bytes);
}

}  // namespace

std::shared_ptr<Matrix> pack(const Source& s) {
  auto m = std::make_shared<Matrix>();
  m->format = s.format;
  m->rows = s.rows;
  m->depth = s.depth;
  m->group = is_scaled(s.format) ? s.group : 0;
  m->zeros = s.zeros != nullptr;
  m->data = share(m->bytes());
  pool::each(m->panels(), 4, s.threads, [&](size_t begin, size_t end) {
    for (size_t p = begin; p < end; ++p) {
      switch (s.format) {
        case Format::f32:
          pack_panel<float>(s, *m, p);
          break;
        case Format::bf16:
          pack_panel<uint16_t>(s, *m, p);
          break;
        case Format::fp8:
          pack_panel<uint8_t>(s, *m, p);
          break;
        default:
          pack_panel<int8_t>(s, *m, p);
      }
      if (m->group) pack_scales(s, *m, p);
    }
  });
  return m;
}
