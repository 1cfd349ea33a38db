// Threads that share a range. Between two calls they spin for half a millisecond, since the next call, of this forward
// or of the next, is near, and then sleep. Who computes which part is not fixed; no result may depend on it.
#pragma once

#include <cstddef>

namespace pool {

using Call = void (*)(const void* work, size_t begin, size_t end);

void run(size_t units, size_t chunk, size_t threads, Call call, const void* work);

// work(begin, end) over [0, units) in pieces of `chunk` or more, on that many threads, the caller's among them.
template <class Work>
void each(size_t units, size_t chunk, size_t threads, const Work& work) {
  run(
      units, chunk, threads,
      [](const void* w, size_t begin, size_t end) { (*static_cast<const Work*>(w))(begin, end); }, &work);
}

}  // namespace pool
