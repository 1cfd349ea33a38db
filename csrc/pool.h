// Threads that wait, take a fixed share of a range each, and wait again. They sleep between calls and never spin.
#pragma once

#include <cstddef>
#include <functional>

// Run work(begin, end) over [0, count) on that many threads, the caller's among them; shares are multiples of `grain`.
void parallel_for(size_t count, size_t grain, size_t threads, const std::function<void(size_t, size_t)>& work);
