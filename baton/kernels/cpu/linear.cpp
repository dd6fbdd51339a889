// y = x · Wᵀ + bias with W packed once, for any number of rows.
//
//     W [N, K]  →  packed [ceil(N / 32)] panels of [kd dwords][32], columns beyond N and elements beyond K are zero
//
// Few rows (≤ 12): a panel is read once, straight from memory, with a prefetch ahead of the stream. Up to 96: row block after row block
// over one slice of a panel that stays in L2, while the next slice is fetched. More: groups of panels that fit L2 × groups of rows.
//
// Gated: W's rows are gate, then up; their panels alternate when packed, so that a thread has the sums of both and gives silu(gate) · up.
#include "kernels.h"
#include "math.h"

namespace baton {
namespace {

constexpr int64_t kSlice = 512;  // dwords of K that are summed by themselves, which keeps the sums of long rows exact
constexpr int64_t kGroupBytes = 512 << 10;  // of panels that stay in L2
constexpr int64_t kFewBlocks = 8;           // row blocks up to which panels are the only axis of tasks
constexpr int64_t kGroupBlocks = 8;         // row blocks of a task beyond that

struct Blocks {  // of rows, all of nearly the same size
    int64_t rows, count;
    explicit Blocks(int64_t m) : rows(m), count(ceil_div(m, kRows)) {}
    int64_t start(int64_t i) const { return i * (rows / count) + (i < rows % count ? i : rows % count); }
};

struct Pieces {  // of panels, a task each: large ones, then small ones, so that all threads end at about the same time
    int64_t panels, large, num_large, small, count;
    Pieces(int64_t n, int64_t parts, int64_t unit) : panels(n) {
        large = std::max<int64_t>(unit, n / parts / unit * unit), small = std::max<int64_t>(unit, large / 8 / unit * unit);
        num_large = n / large * 3 / 4;
        count = num_large + ceil_div(n - num_large * large, small);
    }
    int64_t start(int64_t i) const { return std::min(panels, std::min(i, num_large) * large + std::max<int64_t>(0, i - num_large) * small); }
};

template <typename T>
struct Job {
    const Linear& p;
    const uint32_t* x;  // rows in dwords
    int64_t pitch;      // dwords
    int64_t kd, panels;
    Blocks blocks;

    // One register tile over a slice of a panel; the sums of the slices before it lie in `part` [rows][kPanel]. `gate` [rows][kPanel]: where a
    // gate's panel leaves what the next one, of up, multiplies by.
    template <int HINT>
    void run(int64_t block, int64_t panel, int64_t k0, int64_t count, float* part, float* gate, const char* ahead, int64_t step) const {
        const int64_t row = blocks.start(block);
        with_rows(int(blocks.start(block + 1) - row), [&](auto tag) {
            constexpr int MR = decltype(tag)::value;
            __m512 sum[MR][2];
#pragma GCC unroll 12
            for (int m = 0; m < MR; m++) {
                sum[m][0] = _mm512_setzero_ps();
                sum[m][1] = _mm512_setzero_ps();
            }
            const uint32_t* w = (const uint32_t*)p.weight + (panel * kd + k0) * kPanel;
            tile<T, MR, HINT>(x + row * pitch + k0, pitch, w, count, sum, ahead, step);
            if (k0) {
#pragma GCC unroll 12
                for (int m = 0; m < MR; m++) {
                    sum[m][0] = _mm512_add_ps(_mm512_loadu_ps(part + m * kPanel), sum[m][0]);
                    sum[m][1] = _mm512_add_ps(_mm512_loadu_ps(part + m * kPanel + 16), sum[m][1]);
                }
            }
            if (k0 + count < kd) {
#pragma GCC unroll 12
                for (int m = 0; m < MR; m++) {
                    _mm512_storeu_ps(part + m * kPanel, sum[m][0]);
                    _mm512_storeu_ps(part + m * kPanel + 16, sum[m][1]);
                }
                return;
            }
            const bool is_up = p.gated && panel % 2;
            const int64_t width = p.gated ? p.n / 2 : p.n, n = (p.gated ? panel / 2 : panel) * kPanel;
            const __mmask16 m0 = tail_mask(width - n), m1 = tail_mask(width - n - 16);
            __m512 b0 = _mm512_setzero_ps(), b1 = b0;
            if (p.bias) {
                const T* bias = (const T*)p.bias + (is_up ? width : 0) + n;
                b0 = Type<T>::load(bias, m0), b1 = Type<T>::load(bias + 16, m1);
            }
            T* out = (T*)p.out + row * p.out_stride + n;
#pragma GCC unroll 12
            for (int m = 0; m < MR; m++) {
                __m512 y0 = _mm512_add_ps(sum[m][0], b0), y1 = _mm512_add_ps(sum[m][1], b1);
                if (p.gated) {
                    float* place = gate + m * kPanel;
                    y0 = Type<T>::round(y0), y1 = Type<T>::round(y1);
                    if (!is_up) {
                        _mm512_storeu_ps(place, silu<T>(y0)), _mm512_storeu_ps(place + 16, silu<T>(y1));
                        continue;
                    }
                    y0 = _mm512_mul_ps(_mm512_loadu_ps(place), y0), y1 = _mm512_mul_ps(_mm512_loadu_ps(place + 16), y1);
                }
                Type<T>::store(out + m * p.out_stride, y0, m0);
                Type<T>::store(out + m * p.out_stride + 16, y1, m1);
            }
        });
    }

    int64_t unit() const { return p.gated ? 2 : 1; }  // panels that stay together

    void stream() const {  // one row block
        const Pieces pieces(panels, num_threads() * 4, unit());
        parallel(pieces.count, [&](int64_t task) {
            const int64_t end = pieces.start(task + 1);
            float part[kRows * kPanel], gate[kRows * kPanel];
            for (int64_t panel = pieces.start(task); panel < end; panel++)
                for (int64_t k0 = 0; k0 < kd; k0 += kSlice) {
                    const char* w = (const char*)p.weight + (panel * kd + k0) * kPanel * 4;
                    run<_MM_HINT_T0>(0, panel, k0, std::min(kSlice, kd - k0), part, gate, w + kAhead, 0);
                }
        });
    }

    void few() const {
        const Pieces pieces(panels, num_threads() * 8, unit());
        parallel(pieces.count, [&](int64_t task) {
            float* part = (float*)scratch(0, 2 * kFewBlocks * kRows * kPanel * 4);
            const int64_t end = pieces.start(task + 1);
            for (int64_t panel = pieces.start(task); panel < end; panel++)
                for (int64_t k0 = 0; k0 < kd; k0 += kSlice) {
                    const int64_t count = std::min(kSlice, kd - k0);
                    const bool last = panel + 1 == end && k0 + count == kd;
                    const char* next = (const char*)p.weight + ((panel * kd + k0 + count) * kPanel) * 4;
                    for (int64_t b = 0; b < blocks.count; b++) {
                        float *sums = part + b * kRows * kPanel, *gate = sums + kFewBlocks * kRows * kPanel;
                        if (b < 2 && !last)
                            run<_MM_HINT_T1>(b, panel, k0, count, sums, gate, next + b * count * 64, 64);
                        else
                            run<-1>(b, panel, k0, count, sums, gate, nullptr, 0);
                    }
                }
        });
    }

    void many() const {
        const int64_t slice = std::min(kd, kSlice), group = std::max(unit(), kGroupBytes / (slice * kPanel * 4) / unit() * unit());
        const int64_t columns = ceil_div(panels, group), row_groups = ceil_div(blocks.count, kGroupBlocks);
        parallel(columns * row_groups, [&](int64_t task) {
            float* part = (float*)scratch(0, kGroupBlocks * group * kRows * kPanel * 4);
            float gate[kRows * kPanel];
            const int64_t first = task / row_groups * group, end = std::min(panels, first + group);
            const int64_t top = task % row_groups * kGroupBlocks, bottom = std::min(blocks.count, top + kGroupBlocks);
            for (int64_t k0 = 0; k0 < kd; k0 += slice)
                for (int64_t b = top; b < bottom; b++)
                    for (int64_t panel = first; panel < end; panel++) {
                        float* place = part + ((b - top) * group + panel - first) * kRows * kPanel;
                        run<-1>(b, panel, k0, std::min(slice, kd - k0), place, gate, nullptr, 0);
                    }
        });
    }

    static constexpr int64_t kAhead = 2048;  // bytes
};

// Rows must not fall into the same few sets of L1, and must be whole dwords.
template <typename T>
const uint32_t* repitch(const Linear& p, int64_t kd, int64_t& pitch) {
    const int64_t bytes = p.x_stride * sizeof(T);
    pitch = bytes / 4;
    const bool whole = p.k % Type<T>::per_dword == 0 && bytes % 4 == 0;
    if (whole && (p.m == 1 || !is_bad_pitch(bytes))) return (const uint32_t*)p.x;
    pitch = ceil_div(kd, 16) * 16 + 16;
    uint32_t* copy = (uint32_t*)scratch(1, p.m * pitch * 4);
    const int64_t rows = 64;
    auto fill = [&](int64_t task) {
        for (int64_t m = task * rows; m < std::min(p.m, (task + 1) * rows); m++) {
            copy[m * pitch + kd - 1] = 0;
            std::memcpy(copy + m * pitch, (const T*)p.x + m * p.x_stride, p.k * sizeof(T));
        }
    };
    if (p.m <= rows)
        fill(0);
    else
        parallel(ceil_div(p.m, rows), fill);
    return copy;
}

template <typename T>
void run_linear(const Linear& p) {
    const int64_t kd = ceil_div(p.k, Type<T>::per_dword);
    int64_t pitch;
    const uint32_t* x = repitch<T>(p, kd, pitch);
    const Job<T> job{p, x, pitch, kd, num_panels(p.n, p.gated), Blocks(p.m)};
    if (job.blocks.count == 1)
        job.stream();
    else if (job.blocks.count <= kFewBlocks)
        job.few();
    else
        job.many();
}

template <typename T>
void pack(const T* weight, int64_t stride, int64_t n, int64_t k, bool gated, T* packed) {
    constexpr int per = Type<T>::per_dword;
    const int64_t kd = ceil_div(k, per), width = gated ? n / 2 : n;
    parallel(num_panels(n, gated), [&](int64_t panel) {
        T* out = packed + panel * kd * kPanel * per;
        const int64_t column0 = (gated ? panel / 2 : panel) * kPanel, half = gated && panel % 2 ? width : 0;
        for (int64_t i = 0; i < kd; i++)
            for (int64_t c = 0; c < kPanel; c++)
                for (int e = 0; e < per; e++) {
                    const int64_t row = column0 + c, column = i * per + e;
                    out[(i * kPanel + c) * per + e] = row < width && column < k ? weight[(half + row) * stride + column] : T{};
                }
    });
}

template <typename T>
void gather(const T* packed, int64_t k, const int64_t* ids, int64_t count, T* out) {
    constexpr int per = Type<T>::per_dword;
    const int64_t kd = ceil_div(k, per), each = 8;
    parallel(ceil_div(count, each), [&](int64_t task) {
        for (int64_t t = task * each; t < std::min(count, (task + 1) * each); t++) {
            const T* from = packed + (ids[t] / kPanel * kd * kPanel + ids[t] % kPanel) * per;
            for (int64_t i = 0; i < k; i++) out[t * k + i] = from[i / per * kPanel * per + i % per];
        }
    });
}

}  // namespace

void linear(const Linear& p) { p.is_bf16 ? run_linear<BF16>(p) : run_linear<float>(p); }

int64_t num_panels(int64_t n, bool gated) { return gated ? 2 * ceil_div(n / 2, kPanel) : ceil_div(n, kPanel); }

void pack_weight(const void* weight, int64_t stride, int64_t n, int64_t k, bool gated, void* packed, bool is_bf16) {
    is_bf16 ? pack((const BF16*)weight, stride, n, k, gated, (BF16*)packed) : pack((const float*)weight, stride, n, k, gated, (float*)packed);
}

void gather_rows(const void* packed, int64_t k, const int64_t* ids, int64_t count, void* out, bool is_bf16) {
    is_bf16 ? gather((const BF16*)packed, k, ids, count, (BF16*)out) : gather((const float*)packed, k, ids, count, (float*)out);
}

}  // namespace baton
