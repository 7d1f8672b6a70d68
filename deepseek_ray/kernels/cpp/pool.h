// Threads that compute tasks together with the thread that asks for them: one pool per process, whoever calls.
//
// (OpenMP has a team for every thread that ever opened a parallel region, and stops spinning between regions once a process
// has more such threads than cores: a decode step of many short products then waits for the kernel each time.)

#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pool {

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// How long a thread looks for work before it sleeps: longer than it takes in Python from one operator to the next and from
// one step to the next. To be woken takes 50 us: without it, a step of one sequence in int4 takes 0.86 of its time.
constexpr std::chrono::microseconds kSpin{400};

template <typename Ready>
bool spin_until(Ready ready) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return ready();
}

class Pool {
public:
    // f(task) for every task below `tasks`, by at most `threads` threads, this one among them. If another thread's tasks
    // are under way, this one does its own alone.
    template <typename F>
    void run(int64_t tasks, int32_t threads, F&& f) {
        if (threads <= 1 || tasks <= 1 || !asking_.try_lock()) {
            for (int64_t task = 0; task < tasks; ++task) f(task);
            return;
        }
        std::lock_guard<std::mutex> lock(asking_, std::adopt_lock);
        for (; num_helpers_ < threads - 1; ++num_helpers_) std::thread([this] { help(); }).detach();
        call_ = [](void* context, int64_t task) { (*static_cast<std::remove_reference_t<F>*>(context))(task); };
        context_ = &f;
        tasks_ = tasks;
        next_.store(0, std::memory_order_relaxed);
        // Helpers join an open job; whoever is late finds it closed and is not waited for.
        const uint64_t round = (state_.load(std::memory_order_relaxed) / kRound + 1) * kRound;
        state_.store(round | uint64_t(threads - 1) * kSeat, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst)) state_.notify_all();
        work();
        state_.fetch_or(kClosed, std::memory_order_acq_rel);
        auto done = [this] { return state_.load(std::memory_order_acquire) % kSeat == kClosed; };
        if (!spin_until(done))
            for (uint64_t seen; (seen = state_.load(std::memory_order_acquire)) % kSeat != kClosed;) state_.wait(seen);
    }

private:
    // state_: helpers at work, a bit for "closed", seats that are left, number of the job.
    static constexpr uint64_t kClosed = 1 << 15, kSeat = 1 << 16, kRound = uint64_t(1) << 32;

    void work() {
        for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) call_(context_, task);
    }

    static bool has_seat(uint64_t state) { return !(state & kClosed) && state % kRound / kSeat; }

    void help() {
        for (uint64_t last = 0;;) {
            uint64_t seen = state_.load(std::memory_order_acquire);
            auto news = [&] { return (seen = state_.load(std::memory_order_acquire)) / kRound != last && has_seat(seen); };
            if (!spin_until(news)) {
                sleeping_.fetch_add(1, std::memory_order_seq_cst);
                while (!news()) state_.wait(seen, std::memory_order_seq_cst);
                sleeping_.fetch_sub(1, std::memory_order_relaxed);
            }
            if (!state_.compare_exchange_strong(seen, seen - kSeat + 1, std::memory_order_acq_rel)) continue;
            last = seen / kRound;
            work();
            const uint64_t before = state_.fetch_sub(1, std::memory_order_acq_rel);
            if (before % kSeat == (kClosed | 1)) state_.notify_all();
        }
    }

    std::mutex asking_;
    int32_t num_helpers_ = 0;
    void (*call_)(void*, int64_t) = nullptr;
    void* context_ = nullptr;
    int64_t tasks_ = 0;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<uint64_t> state_{kClosed};
    alignas(64) std::atomic<int32_t> sleeping_{0};
};

// Never destroyed: its threads run until the process ends.
inline Pool& shared() {
    static Pool* const it = new Pool;
    return *it;
}

template <typename F>
void run(int64_t tasks, int32_t threads, F&& f) {
    shared().run(tasks, threads, static_cast<F&&>(f));
}

}  // namespace pool
