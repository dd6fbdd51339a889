// Tasks on torch's threads, or on threads of our own: the caller and num_threads() - 1 helpers, which sleep when there was nothing to do
// for a moment.
//
//     state = epoch · next task · number of tasks       a task is claimed by one compare-and-swap of all three
//
// A call waits for claimed tasks only, never for a helper that has not come: where cores are shared with other processes, or after a fork,
// the caller simply does more of the work itself. Results never depend on who did what.
//
// Where cores are shared, Linux may leave two of our threads on one core while another idles, for up to 10 ms; a task of theirs then holds
// up all others. So a thread that begins to work sends those who wait for its core to another one, and who has nothing left to do lends its
// core to a thread in a task whose CPU clock stands still.
#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

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
constexpr int kStill = 400;   // of those, without a tick of a thread's CPU clock, mean that it is off its core
constexpr int kSeats = 64;    // threads that can be moved

class alignas(64) Seat {  // of a thread that runs tasks
  public:
    std::atomic<int> core{-1};  // where it was when it last began to work; -1: it was sent elsewhere since
    std::atomic<bool> working{false};

    void take() {
        clockid_t id;
        if (thread_.load(std::memory_order_relaxed) == gettid() || pthread_getcpuclockid(pthread_self(), &id)) return;
        clock_.store(id, std::memory_order_relaxed), thread_.store(gettid(), std::memory_order_release);
        const sched_param none{};
        if (sched_getscheduler(0) == SCHED_OTHER) sched_setscheduler(0, SCHED_BATCH, &none);  // who lends it a core falls asleep first
    }

    // To another core, if it waits for the calling thread's.
    void send_away() {
        core.store(-1, std::memory_order_relaxed);
        move([](cpu_set_t& cores, int here) { CPU_CLR(here, &cores); });
    }

    // To the calling thread's core, if it is in a task and off its own.
    void fetch() {
        if (!working.load(std::memory_order_acquire)) return;
        const int64_t before = ran();
        for (int i = 0; i < kStill; i++) _mm_pause();
        if (before < 0 || ran() != before || !working.load(std::memory_order_acquire)) return;
        move([](cpu_set_t& cores, int here) {
            CPU_ZERO(&cores);
            CPU_SET(here, &cores);
        });
    }

  private:
    int64_t ran() const {  // nanoseconds; -1: it is not of this process (after a fork)
        timespec now;
        return clock_gettime(clock_.load(std::memory_order_relaxed), &now) ? -1 : now.tv_sec * 1'000'000'000 + now.tv_nsec;
    }

    // A thread that waits for a core moves when the cores that it may use change. Those stay as they were in the end.
    template <typename F>
    void move(F&& change) {
        std::unique_lock<std::mutex> mine(moving_, std::try_to_lock);
        const pid_t id = thread_.load(std::memory_order_acquire);
        cpu_set_t allowed;
        if (!mine || !id || ran() < 0 || sched_getaffinity(id, sizeof allowed, &allowed)) return;
        cpu_set_t wanted = allowed;
        change(wanted, sched_getcpu());
        if (sched_setaffinity(id, sizeof wanted, &wanted) == 0) sched_setaffinity(id, sizeof allowed, &allowed);
    }

    std::mutex moving_;  // else one mover would take another's change for what is allowed
    std::atomic<pid_t> thread_{0};
    std::atomic<clockid_t> clock_{0};
};

class Pool {
  public:
    bool run(int64_t tasks, int threads, TaskBody body, void* context) {
        std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
        if (!mine || tasks > kMost) return false;
        for (int i; (i = helpers_.load(std::memory_order_relaxed)) < threads - 1; helpers_.store(i + 1, std::memory_order_relaxed))
            std::thread([this, i] { help(i); }).detach();
        allowed_.store(threads - 1, std::memory_order_relaxed);
        body_ = body, context_ = context, error_ = nullptr;
        done_.store(0, std::memory_order_relaxed);
        const uint64_t epoch = (state_.load(std::memory_order_relaxed) >> 2 * kBits) + 1;
        state_.store(epoch << 2 * kBits | uint64_t(tasks), std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst)) {
            wake_.fetch_add(1, std::memory_order_seq_cst);
            wake_.notify_all();
        }
        seats_[0].take();
        work(0);
        for (int i = 0, done; (done = done_.load(std::memory_order_acquire)) < tasks; i++)
            if (i < kSpins) {
                _mm_pause();
            } else {  // a helper was put off its core: it gets this one
                lend(0);
                waiting_.store(true, std::memory_order_seq_cst);
                if (done_.load(std::memory_order_seq_cst) == done) done_.wait(done);
                waiting_.store(false, std::memory_order_relaxed);
            }
        if (error_) std::rethrow_exception(error_);
        return true;
    }

  private:
    static bool open(uint64_t state) { return int64_t(state >> kBits & kMost) < int64_t(state & kMost); }

    template <typename F>
    void others(int mine, F&& body) {
        for (int seat = 0; seat <= std::min(helpers_.load(std::memory_order_relaxed), kSeats - 1); seat++)
            if (seat != mine) body(seats_[seat]);
    }

    void lend(int mine) {
        others(mine, [](Seat& seat) { seat.fetch(); });
    }

    void spread(int mine) {
        const int core = sched_getcpu();
        if (mine < kSeats) seats_[mine].core.store(core, std::memory_order_relaxed);
        others(mine, [core](Seat& seat) {
            if (seat.core.load(std::memory_order_relaxed) == core) seat.send_away();
        });
    }

    // Claims and runs tasks until none is left.
    void work(int seat) {
        spread(seat);
        std::atomic<bool> none{false}, &working = seat < kSeats ? seats_[seat].working : none;
        working.store(true, std::memory_order_release);
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
        working.store(false, std::memory_order_release);
    }

    void help(int index) {
        if (index + 1 < kSeats) seats_[index + 1].take();
        for (;;) {
            const int seen = wake_.load(std::memory_order_seq_cst);
            for (int i = 0; i < kSpins; i++) {
                if (index < allowed_.load(std::memory_order_relaxed) && open(state_.load(std::memory_order_relaxed))) work(index + 1), i = 0;
                _mm_pause();
            }
            lend(index + 1);
            sleepers_.fetch_add(1, std::memory_order_seq_cst);
            if (index >= allowed_.load(std::memory_order_relaxed) || !open(state_.load(std::memory_order_seq_cst))) wake_.wait(seen);
            sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        }
    }

    std::mutex busy_, failing_;
    std::atomic<int> helpers_{0};
    Seat seats_[kSeats];  // the caller's, then the helpers'
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
