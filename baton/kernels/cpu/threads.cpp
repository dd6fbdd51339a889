// Tasks on torch's threads, or on threads of our own: the caller and num_threads() - 1 helpers, which sleep when there was nothing to do
// for a moment.
//
//     state = epoch · next task · number of tasks       a task is claimed by one compare-and-swap of all three
//
// A call waits for claimed tasks only, never for a helper that has not come: where cores are shared with other processes, or after a fork,
// the caller simply does more of the work itself. Results never depend on who did what.
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

#include "kernels.h"

namespace baton {
namespace {

constexpr int kBits = 20;  // of the two counts
constexpr int64_t kMost = (1 << kBits) - 1;
constexpr int kSpins = 4000;  // looks at the state before a helper sleeps: some 50 microseconds

class Pool {
  public:
    bool run(int64_t tasks, int threads, TaskBody body, void* context) {
        std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
        if (!mine || tasks > kMost) return false;
        for (; helpers_ < threads - 1; helpers_++) std::thread([this, index = helpers_] { help(index); }).detach();
        allowed_.store(threads - 1, std::memory_order_relaxed);
        body_ = body, context_ = context, error_ = nullptr;
        done_.store(0, std::memory_order_relaxed);
        const uint64_t epoch = (state_.load(std::memory_order_relaxed) >> 2 * kBits) + 1;
        state_.store(epoch << 2 * kBits | uint64_t(tasks), std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst)) {
            wake_.fetch_add(1, std::memory_order_seq_cst);
            wake_.notify_all();
        }
        work();
        for (int i = 0, done; (done = done_.load(std::memory_order_acquire)) < tasks; i++)
            if (i < kSpins) {
                _mm_pause();
            } else {  // a helper was put off its core: it gets this one
                waiting_.store(true, std::memory_order_seq_cst);
                if (done_.load(std::memory_order_seq_cst) == done) done_.wait(done);
                waiting_.store(false, std::memory_order_relaxed);
            }
        if (error_) std::rethrow_exception(error_);
        return true;
    }

  private:
    static bool open(uint64_t state) { return int64_t(state >> kBits & kMost) < int64_t(state & kMost); }

    // Claims and runs tasks until none is left.
    void work() {
        for (uint64_t state = state_.load(std::memory_order_acquire); open(state);) {
            if (!state_.compare_exchange_weak(state, state + (1ull << kBits), std::memory_order_acq_rel)) continue;
            try {
                body_(context_, state >> kBits & kMost);
            } catch (...) {
                std::lock_guard<std::mutex> guard(failing_);
                if (!error_) error_ = std::current_exception();
            }
            done_.fetch_add(1, std::memory_order_seq_cst);
            if (waiting_.load(std::memory_order_seq_cst)) done_.notify_one();
            state = state_.load(std::memory_order_acquire);
        }
    }

    void help(int index) {
        for (;;) {
            const int seen = wake_.load(std::memory_order_seq_cst);
            for (int i = 0; i < kSpins; i++) {
                if (index < allowed_.load(std::memory_order_relaxed) && open(state_.load(std::memory_order_relaxed))) work(), i = 0;
                _mm_pause();
            }
            sleepers_.fetch_add(1, std::memory_order_seq_cst);
            if (index >= allowed_.load(std::memory_order_relaxed) || !open(state_.load(std::memory_order_seq_cst))) wake_.wait(seen);
            sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        }
    }

    std::mutex busy_, failing_;
    int helpers_ = 0;
    TaskBody body_ = nullptr;
    void* context_ = nullptr;
    std::exception_ptr error_;
    alignas(64) std::atomic<uint64_t> state_{0};
    alignas(64) std::atomic<int> done_{0};
    std::atomic<bool> waiting_{false};
    alignas(64) std::atomic<int> wake_{0}, sleepers_{0}, allowed_{0};
};

std::atomic<bool> own_threads{false};

}  // namespace

void use_own_threads(bool on) { own_threads.store(on, std::memory_order_relaxed); }

void run_tasks(int64_t tasks, TaskBody body, void* context) {
    static Pool* pool = new Pool;  // never destroyed: its helpers live as long as the process
    const int threads = num_threads();
    if (tasks > 1 && threads > 1) {
        if (!own_threads.load(std::memory_order_relaxed)) return run_on_torch(tasks, body, context);
        if (pool->run(tasks, threads, body, context)) return;
    }
    for (int64_t i = 0; i < tasks; i++) body(context, i);
}

void* scratch(int slot, int64_t bytes) {
    struct Buffer {
        void* data = nullptr;
        int64_t size = 0;
        ~Buffer() { std::free(data); }
    };
    static thread_local Buffer buffers[3];
    Buffer& b = buffers[slot];
    if (b.size < bytes) {
        std::free(b.data);
        b.size = (bytes + bytes / 2 + 4095) / 4096 * 4096;
        b.data = std::aligned_alloc(4096, b.size);
        if (!b.data) b.size = 0, throw std::bad_alloc();
    }
    return b.data;
}

}  // namespace baton
