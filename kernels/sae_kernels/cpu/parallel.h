// Tasks over threads. Every task writes its own outputs, so results do not depend on the number of threads.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <thread>
#include <vector>

namespace sae {

// Subnormal numbers count as zero while this lives, as they do inside vdpbf16ps: Adam's moments of silent latents decay
// into them, and arithmetic on them is many times slower.
class FlushSubnormals {
    unsigned saved = _mm_getcsr();

   public:
    FlushSubnormals() { _mm_setcsr(saved | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(saved); }
};

// Starting a thread takes some 20 us, little beside a phase of a step, so there is no pool.
template <class Task>
void parallel(long tasks, long threads, const Task& task) {
    std::atomic<long> next{0};
    auto work = [&] {
        FlushSubnormals flush;
        for (long i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i);
    };
    std::vector<std::thread> others;
    for (long t = 1; t < threads && t < tasks; t++) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
}

constexpr long CHUNK = 64;  // of rows or latents: of one task, or of one partial sum; fixed, so that sums are, too

inline long blocks(long n, long size) { return (n + size - 1) / size; }

}  // namespace sae
