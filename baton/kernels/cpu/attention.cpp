// Attention over paged KV, read where it lies. One task: the query heads that share a KV head × some queries of one sequence, as rows.
//
//     for 64 keys at a time:  K → panels of Kᵀ │ S = Q · Kᵀ │ online softmax (Milakov & Gimelshein 2018) │ V → panels │ O += P · V
//
// Keys are cut at absolute positions, into tiles of 64 and spans of 512. A span has its own softmax, and spans are joined in order
// (FlashDecoding's combination), whether one thread or several computed them. So a row's bits depend on its query and its context only.
#include <cmath>
#include <vector>

#include "kernels.h"
#include "math.h"

namespace baton {
namespace {

constexpr int64_t kKeys = 64;    // of a tile
constexpr int64_t kSpan = 512;   // keys
constexpr int64_t kQueryRows = 96;  // aimed at, of a task
constexpr int64_t kMaxDim = 256;

struct Tile {  // a task's share
    int64_t sequence, kv_head, first, count;  // queries, counted from the sequence's first new token
    int64_t begin, end;                       // keys that any of them sees
    int64_t span, place;                      // the only span to compute and where its result goes, or -1: all, written to `out`
};

inline void transpose16(__m512i (&r)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {  // r[4i + j]: 32-bit column j of each 128-bit lane, of rows 4i … 4i + 3
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        const __m512i c = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(a, b, 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

template <typename T>
class Worker {
  public:
    static constexpr int per = Type<T>::per_dword;

    explicit Worker(const PagedAttention& p)
        : p_(p), group_(p.num_heads / p.kv.num_heads), rows_(std::max(kQueryRows, group_)), wide_(ceil_div(p.dim, kPanel) * kPanel),
          kd_(p.dim / per) {
        const int64_t floats[] = {rows_ * kd_, kKeys * kd_, rows_ * kKeys, rows_ * kKeys, kKeys * wide_, rows_ * wide_, rows_ * wide_,
                                  rows_, rows_ * 16, rows_, rows_, rows_};
        int64_t sum = 0;
        for (int64_t f : floats) sum += ceil_div(f, 16) * 16;
        float* at = (float*)scratch(0, sum * 4);
        float** parts[] = {(float**)&q_, (float**)&keys_, &scores_, (float**)&weights_, (float**)&values_, &out_, &total_,
                           &top_, &mass_, &total_top_, &total_mass_, &decay_};
        for (int i = 0; i < 12; i++) *parts[i] = at, at += ceil_div(floats[i], 16) * 16;
    }

    // `partial`: rows of [wide + 2] fp32, from tile.place on. `following`: what this thread does next, if it is known.
    void run(const Tile& tile, float* partial, const Tile* following) {
        load_queries(tile);
        rows_in_use_ = tile.count * group_;
        if (tile.span >= 0) {
            span(tile, tile.span, following);
            float* to = partial + tile.place;
            for (int64_t r = 0; r < rows_in_use_; r++, to += wide_ + 2) {
                std::memcpy(to, out_ + r * wide_, wide_ * 4);
                to[wide_] = top_[r], to[wide_ + 1] = mass(r);
            }
            return;
        }
        start_total();
        for (int64_t s = tile.begin / kSpan; s * kSpan < tile.end; s++) {
            span(tile, s, following);
            for (int64_t r = 0; r < rows_in_use_; r++) join(r, out_ + r * wide_, top_[r], mass(r));
        }
        write(tile);
    }

    void combine(const Tile& tile, const float* partial, int64_t spans) {
        rows_in_use_ = tile.count * group_;
        start_total();
        for (int64_t s = 0; s < spans; s++)
            for (int64_t r = 0; r < rows_in_use_; r++, partial += wide_ + 2) join(r, partial, partial[wide_], partial[wide_ + 1]);
        write(tile);
    }

  private:
    [[gnu::noinline]] void load_queries(const Tile& tile) {
        const T* q = (const T*)p_.q + (p_.query_start[tile.sequence] + tile.first) * p_.q_stride + tile.kv_head * group_ * p_.dim;
        for (int64_t i = 0; i < tile.count; i++) std::memcpy(q_ + i * group_ * kd_, q + i * p_.q_stride, group_ * p_.dim * sizeof(T));
    }

    [[gnu::noinline]] void start_total() {
        std::fill(total_, total_ + rows_in_use_ * wide_, 0.0f);
        std::fill(total_top_, total_top_ + rows_in_use_, -INFINITY);
        std::fill(total_mass_, total_mass_ + rows_in_use_, 0.0f);
    }

    static float scalar_exp2(float x) { return _mm512_cvtss_f32(exp2<false>(_mm512_set1_ps(x))); }
    float mass(int64_t r) const { return _mm512_reduce_add_ps(_mm512_loadu_ps(mass_ + r * 16)); }

    [[gnu::noinline]] void join(int64_t r, const float* out, float top, float mass) {
        if (top == -INFINITY) return;
        float* total = total_ + r * wide_;
        const float highest = std::max(total_top_[r], top);
        const float a = scalar_exp2(total_top_[r] - highest), b = scalar_exp2(top - highest);
        const __m512 va = _mm512_set1_ps(a), vb = _mm512_set1_ps(b);
        for (int64_t c = 0; c < wide_; c += 16) {
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(total + c), va);
            _mm512_storeu_ps(total + c, _mm512_fmadd_ps(_mm512_loadu_ps(out + c), vb, scaled));
        }
        total_mass_[r] = total_mass_[r] * a + mass * b;
        total_top_[r] = highest;
    }

    [[gnu::noinline]] void write(const Tile& tile) {
        T* out = (T*)p_.out + (p_.query_start[tile.sequence] + tile.first) * p_.out_stride + tile.kv_head * group_ * p_.dim;
        for (int64_t r = 0; r < rows_in_use_; r++) {
            const __m512 scale = _mm512_set1_ps(total_mass_[r] > 0 ? 1.0f / total_mass_[r] : 0.0f);
            T* to = out + r / group_ * p_.out_stride + r % group_ * p_.dim;
            for (int64_t c = 0; c < p_.dim; c += 16) Type<T>::store(to + c, _mm512_mul_ps(_mm512_loadu_ps(total_ + r * wide_ + c), scale));
        }
    }

    // Softmax and output of the keys of one span, not normalised: out_, top_ (highest score), mass_ (sums of exponentials).
    // Scores are in units of log2 e, so that powers of two will do.
    void span(const Tile& tile, int64_t index, const Tile* following) {
        const int64_t begin = std::max(tile.begin, index * kSpan), end = std::min(tile.end, (index + 1) * kSpan);
        std::fill(out_, out_ + rows_in_use_ * wide_, 0.0f);
        std::fill(top_, top_ + rows_in_use_, -INFINITY);
        std::fill(mass_, mass_ + rows_in_use_ * 16, 0.0f);
        for (int64_t start = begin / kKeys * kKeys; start < end; start += kKeys) {
            const Places now = places(tile, start, begin, end);
            const int64_t after = start + kKeys;
            next_ = after < tile.end ? places(tile, after, after, tile.end) : following ? first_places(*following) : Places();
            fetched_ = 0;
            const int64_t panels = end - start > kPanel ? 2 : 1;
            load_keys(now.key, panels);
            load_values(now.key, panels);
            score(panels);
            soften(tile, start, begin, end, panels);
            accumulate(panels);
        }
    }

    struct Places {  // where the keys of 64 positions lie (values: kind_stride further); null: nobody sees it
        const T* key[kKeys];
        int64_t count = 0;  // keys up to `end`
    };

    [[gnu::noinline]] Places places(const Tile& tile, int64_t start, int64_t begin, int64_t end) const {
        const T* data = (const T*)p_.kv.data + tile.kv_head * p_.kv.head_stride;
        const int32_t* table = p_.block_tables + tile.sequence * p_.table_stride;
        const int64_t size = p_.kv.block_size, step = p_.kv.token_stride;
        Places all;
        all.count = std::min(kKeys, end - start);
        for (int64_t i = std::max<int64_t>(0, begin - start); i < all.count;) {
            const int64_t in_block = (start + i) & (size - 1), stop = std::min(all.count, i + size - in_block);
            const T* at = data + table[(start + i) >> block_shift_] * p_.kv.block_stride + in_block * step;
            for (; i < stop; i++, at += step) all.key[i] = at;
        }
        for (int64_t i = all.count; i < kKeys; i++) all.key[i] = nullptr;
        for (int64_t i = 0; i < std::min(all.count, begin - start); i++) all.key[i] = nullptr;
        return all;
    }

    Places first_places(const Tile& tile) const {
        const int64_t start = tile.begin / kKeys * kKeys;
        return places(tile, start, tile.begin, tile.end);
    }

    // Brings some of the next tile's keys and values closer.
    void fetch(int64_t keys) {
        for (const int64_t stop = std::min(next_.count, fetched_ + keys); fetched_ < stop; fetched_++) {
            const T* at = next_.key[fetched_];
            for (int64_t c = 0; at && c < p_.dim; c += 64 / sizeof(T)) {
                _mm_prefetch(at + c, _MM_HINT_T1);
                _mm_prefetch(at + p_.kv.kind_stride + c, _MM_HINT_T1);
            }
        }
    }

    // keys_: [panel][kd][32]; columns of keys that nobody sees are zero.
    [[gnu::noinline]] void load_keys(const T* const* place, int64_t panels) {
        for (int64_t k = 0; k < panels * kPanel; k += 16) {
            fetch(kKeys / 8);
            for (int64_t c = 0; c < kd_; c += 16) {
                const __mmask16 m = tail_mask(kd_ - c);
                __m512i r[16];
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++)
                    r[i] = place[k + i] ? _mm512_maskz_loadu_epi32(m, (const uint32_t*)place[k + i] + c) : _mm512_setzero_si512();
                transpose16(r);
                uint32_t* to = keys_ + (k / kPanel * kd_ + c) * kPanel + k % kPanel;
                const int64_t count = std::min<int64_t>(16, kd_ - c);
                if (count == 16) {
#pragma GCC unroll 16
                    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * kPanel, r[i]);
                } else {
                    for (int i = 0; i < count; i++) _mm512_storeu_si512(to + i * kPanel, r[i]);
                }
            }
        }
    }

    static inline __m512i dwords(const BF16* first, const BF16* second) {
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)first));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)second));
        return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
    }
    static inline __m512i dwords(const float* only, const float*) { return _mm512_loadu_si512(only); }

    // values_: [panel of dims][kKeys / per][32].
    [[gnu::noinline]] void load_values(const T* const* place, int64_t panels) {
        static const T zeros[kMaxDim] = {};
        const int64_t kind = p_.kv.kind_stride;
        for (int64_t k = 0; k < panels * kPanel; k += per) {
            if (k % 16 == 0) fetch(kKeys / 8);
            const T *first = place[k] ? place[k] + kind : zeros, *second = place[k + per - 1] ? place[k + per - 1] + kind : zeros;
            uint32_t* to = values_ + k / per * kPanel;
            int64_t c = 0;
            for (; c + kPanel <= p_.dim; c += kPanel, to += kKeys / per * kPanel) {
                _mm512_storeu_si512(to, dwords(first + c, second + c));
                _mm512_storeu_si512(to + 16, dwords(first + c + 16, second + c + 16));
            }
            if (c < p_.dim) _mm512_storeu_si512(to, dwords(first + c, second + c));
        }
    }

    // scores_ [row][kKeys] = q · k, not scaled.
    [[gnu::noinline]] void score(int64_t panels) {
        for (int64_t r = 0; r < rows_in_use_; r += kRows)
            with_rows(int(std::min<int64_t>(kRows, rows_in_use_ - r)), [&](auto tag) {
                constexpr int MR = decltype(tag)::value;
                for (int64_t panel = 0; panel < panels; panel++) {
                    __m512 sum[MR][2];
#pragma GCC unroll 12
                    for (int m = 0; m < MR; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
                    tile<T, MR, -1>(q_ + r * kd_, kd_, keys_ + panel * kd_ * kPanel, kd_, sum, nullptr, 0);
                    float* to = scores_ + r * kKeys + panel * kPanel;
#pragma GCC unroll 12
                    for (int m = 0; m < MR; m++) {
                        _mm512_storeu_ps(to + m * kKeys, sum[m][0]);
                        _mm512_storeu_ps(to + m * kKeys + 16, sum[m][1]);
                    }
                }
            });
    }

    // scores_ → weights_ [row][kKeys / per] = exp(score - highest so far), in T; decay_: what the output so far is multiplied by.
    [[gnu::noinline]] void soften(const Tile& tile, int64_t start, int64_t begin, int64_t end, int64_t panels) {
        const int64_t length = p_.query_start[tile.sequence + 1] - p_.query_start[tile.sequence];
        const int64_t offset = p_.context_lens[tile.sequence] - length + tile.first;
        for (int64_t r = 0; r < rows_in_use_; r++) {
            const int64_t position = offset + r / group_;
            const int64_t from = std::max(begin, p_.window ? position - p_.window + 1 : 0) - start, to = std::min(end, position + 1) - start;
            if (from <= 0 && to >= kKeys)
                soften_row<true>(r, 0, kKeys, 4);
            else
                soften_row<false>(r, from, to, int(2 * panels));
        }
    }

    // Of the row's keys from … to in this tile; ALL: of all 64.
    template <bool ALL>
    [[gnu::always_inline]] void soften_row(int64_t r, int64_t from, int64_t to, int vectors) {
        const __m512 scale = _mm512_set1_ps(1.44269504f / std::sqrt(float(p_.dim))), none = _mm512_set1_ps(-INFINITY);
        __m512 s[4], highest = none;
#pragma GCC unroll 4
        for (int i = 0; i < (ALL ? 4 : vectors); i++) {
            const __m512 raw = _mm512_loadu_ps(scores_ + r * kKeys + 16 * i);
            s[i] = ALL ? _mm512_mul_ps(raw, scale) : _mm512_mask_mul_ps(none, tail_mask(to - 16 * i) & ~tail_mask(from - 16 * i), raw, scale);
            highest = _mm512_max_ps(highest, s[i]);
        }
        const float top = std::max(top_[r], _mm512_reduce_max_ps(highest));
        decay_[r] = top == top_[r] ? 1.0f : scalar_exp2(top_[r] - top);
        top_[r] = top;
        const __m512 base = _mm512_set1_ps(top == -INFINITY ? 0.0f : top);
        __m512 mass = _mm512_mul_ps(_mm512_loadu_ps(mass_ + r * 16), _mm512_set1_ps(decay_[r]));
        T* weights = (T*)(weights_ + r * (kKeys / per));
#pragma GCC unroll 4
        for (int i = 0; i < (ALL ? 4 : vectors); i++) {
            const __m512 w = exp2<per == 2>(_mm512_sub_ps(s[i], base));
            mass = _mm512_add_ps(mass, w);
            Type<T>::store(weights + 16 * i, w);
        }
        _mm512_storeu_ps(mass_ + r * 16, mass);
    }

    [[gnu::noinline]] void accumulate(int64_t panels) {
        for (int64_t r = 0; r < rows_in_use_; r += kRows)
            with_rows(int(std::min<int64_t>(kRows, rows_in_use_ - r)), [&](auto tag) {
                constexpr int MR = decltype(tag)::value;
                for (int64_t c = 0; c < wide_; c += kPanel) {
                    __m512 sum[MR][2];
                    float* out = out_ + r * wide_ + c;
#pragma GCC unroll 12
                    for (int m = 0; m < MR; m++) {
                        const __m512 decay = _mm512_set1_ps(decay_[r + m]);
                        sum[m][0] = _mm512_mul_ps(_mm512_loadu_ps(out + m * wide_), decay);
                        sum[m][1] = _mm512_mul_ps(_mm512_loadu_ps(out + m * wide_ + 16), decay);
                    }
                    const uint32_t* values = values_ + c * (kKeys / per);
                    tile<T, MR, -1>(weights_ + r * (kKeys / per), kKeys / per, values, panels * kPanel / per, sum, nullptr, 0);
#pragma GCC unroll 12
                    for (int m = 0; m < MR; m++) {
                        _mm512_storeu_ps(out + m * wide_, sum[m][0]);
                        _mm512_storeu_ps(out + m * wide_ + 16, sum[m][1]);
                    }
                }
            });
    }

    const PagedAttention& p_;
    const int64_t group_, rows_, wide_, kd_;
    const int64_t block_shift_ = __builtin_ctzll(p_.kv.block_size);
    int64_t rows_in_use_ = 0, fetched_ = 0;
    Places next_;
    uint32_t *q_, *keys_, *weights_, *values_;
    float *scores_, *out_, *total_, *top_, *mass_, *total_top_, *total_mass_, *decay_;
};

// The tasks of a call: per sequence and KV head, the queries in pieces, the last (with the longest context) first.
std::vector<Tile> tiles(const PagedAttention& p) {
    std::vector<Tile> all;
    const int64_t group = p.num_heads / p.kv.num_heads, each = std::max<int64_t>(1, kQueryRows / group);
    for (int64_t s = 0; s < p.sequences; s++) {
        const int64_t length = p.query_start[s + 1] - p.query_start[s], context = p.context_lens[s];
        for (int64_t piece = ceil_div(length, each) - 1; piece >= 0; piece--) {
            const int64_t first = piece * each, count = std::min(each, length - first);
            const int64_t end = std::max<int64_t>(0, context - length + first + count);
            const int64_t begin = p.window ? std::max<int64_t>(0, end - count - p.window + 1) : 0;
            for (int64_t h = 0; h < p.kv.num_heads; h++) all.push_back({s, h, first, count, begin, end, -1, 0});
        }
    }
    return all;
}

// Neighbours go to one thread where there are many tasks, which then knows what it will read next.
template <typename T>
void run_all(const PagedAttention& p, const std::vector<Tile>& tasks, float* partial) {
    const int64_t count = tasks.size(), each = std::clamp<int64_t>(count / (num_threads() * 4), 1, 4);
    parallel(ceil_div(count, each), [&](int64_t i) {
        Worker<T> worker(p);
        const int64_t end = std::min(count, (i + 1) * each);
        for (int64_t t = i * each; t < end; t++) worker.run(tasks[t], partial, t + 1 < end ? &tasks[t + 1] : nullptr);
    });
}

template <typename T>
void attend(const PagedAttention& p) {
    const std::vector<Tile> whole = tiles(p);
    int64_t spans = 0;
    for (const Tile& t : whole) spans = std::max(spans, ceil_div(t.end, kSpan) - t.begin / kSpan);
    if (spans <= 1 || int64_t(whole.size()) >= 4 * num_threads()) return run_all<T>(p, whole, nullptr);
    std::vector<Tile> parts;
    std::vector<int64_t> places;
    int64_t place = 0;
    const int64_t row = ceil_div(p.dim, kPanel) * kPanel + 2;
    for (const Tile& t : whole) {
        places.push_back(place);
        for (int64_t s = t.begin / kSpan; s * kSpan < t.end; s++) {
            parts.push_back({t.sequence, t.kv_head, t.first, t.count, t.begin, t.end, s, place});
            place += t.count * (p.num_heads / p.kv.num_heads) * row;
        }
    }
    std::vector<float> partial(place);
    run_all<T>(p, parts, partial.data());
    parallel(whole.size(), [&](int64_t i) {
        const int64_t count = whole[i].end > 0 ? ceil_div(whole[i].end, kSpan) - whole[i].begin / kSpan : 0;
        Worker<T>(p).combine(whole[i], partial.data() + places[i], count);
    });
}

}  // namespace

void paged_attention(const PagedAttention& p) { p.is_bf16 ? attend<BF16>(p) : attend<float>(p); }

}  // namespace baton
