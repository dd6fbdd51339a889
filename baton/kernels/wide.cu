// out[M, N] = x[M, K] · weight[N, K]ᵀ (+ bias) for 64 to 256 rows of x: all of them against ROWS rows of the weight in one block, by wgmma.
//
// x is the 64-row operand, the weight's rows are the columns: any multiple of 8 fits, so that N is cut into equal shares for the SMs. A
// warpgroup multiplies 64 rows of x with ROWS / SPLIT of the weight's.
// Two warps copy tiles into rings, one the weight's, the first ones before the previous kernel has ended (they depend on no kernel), the
// other x's. A buffer is free once it is multiplied; LATE: once the next one is begun, where the tensor cores are what is waited for.
// PAIR: the weight is [gate; up]; the block takes ROWS / 2 of each and stores silu(gate) · up.
// ADD: what out holds is added. It is asked for before the sums begin, and waited for at their end.
// SHARE: a cluster of so many blocks shares ROWS rows, each with its part of K, and so takes in less of x for its weights. At the end each
// gets the others' sums of its part of the columns, through its shared memory. One tile a cluster.
// Compiled at run time after common.cuh and multiply(): ROWS TOKENS SPLIT SHARE BOXES STAGES X_STAGES LATE PAIR ADD BIAS HALF (macros, integers).

constexpr int WARPS = TOKENS / 64 * SPLIT * 4;
constexpr int PART = ROWS / SPLIT;              // columns of a warpgroup: with PAIR, half of them gate and half up
constexpr int COPIED = PAIR ? PART / 2 : ROWS;  // rows of a box
constexpr int OUT_ROWS = PAIR ? ROWS / 2 : ROWS, OUT_PART = OUT_ROWS / SPLIT;
constexpr u32 W_BOX = ROWS * 128, X_BOX = TOKENS * 128, W_STAGE = BOXES * W_BOX, X_STAGE = BOXES * X_BOX;
constexpr int KEPT = OUT_PART / 8 / SHARE;      // of columns that a warpgroup stores, in eights
static_assert(SHARE == 1 || (KEPT * 8 * SHARE == PART && SPLIT == 1 && TOKENS == 64 && !PAIR));
static_assert(OUT_PART % 8 == 0 && OUT_PART * SPLIT == OUT_ROWS && PART <= 256 && TOKENS % 64 == 0 && TOKENS <= 256);

// A K-major tile of rows of 64 elements, swizzled by 128 bytes: eight rows are 1024 bytes apart.
__device__ __forceinline__ u64 tile_descriptor(u32 address) { return (u64)((address & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

// Buffers in turn. full: their bytes are there; empty: every warp has multiplied them.
template <int COUNT, u32 BYTES>
struct Ring {
    u32 memory, full, empty;
    __device__ __forceinline__ Ring(u32 memory, u64* bars) : memory(memory), full(shared_address(bars)), empty(full + 8 * COUNT) {}
    __device__ __forceinline__ void init() const {
        for (int i = 0; i < COUNT; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __device__ __forceinline__ u32 at(int i) const { return memory + i % COUNT * BYTES; }
    __device__ __forceinline__ u32 claim(int i) const {
        const u32 bar = full + 8 * (i % COUNT);
        if (i >= COUNT) barrier_wait(empty + 8 * (i % COUNT), (i / COUNT - 1) & 1);
        barrier_expect(bar, BYTES);
        return bar;
    }
    __device__ __forceinline__ void wait(int i) const { barrier_wait(full + 8 * (i % COUNT), (i / COUNT) & 1); }
    __device__ __forceinline__ void release(int i) const { barrier_arrive(empty + 8 * (i % COUNT)); }
};

// Gives the other blocks of the cluster the sums of their columns, and puts those of its own, all blocks' together, at d's begin. mail: where
// the others put theirs, which bar counts.
__device__ __forceinline__ void exchange(float (&d)[PART / 2], u32 mail, u32 bar, int rank) {
    constexpr u32 LETTER = 128 * 16;  // bytes of eight columns: four sums of each thread
    mail += threadIdx.x * 16;
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");  // the others' barriers are there
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
        if (i == rank) continue;
        u32 there, their_bar;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(mail + (rank - (rank > i)) * KEPT * LETTER), "r"(i));
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(their_bar) : "r"(bar), "r"(i));
#pragma unroll
        for (int j = 0; j < KEPT; ++j) {
            const float* c = d + (i * KEPT + j) * 4;
            asm volatile(
                "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there + j * LETTER),
                "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]), "r"(their_bar)
                : "memory");
        }
    }
#pragma unroll
    for (int i = 1; i < SHARE; ++i)
        if (i == rank)
#pragma unroll
            for (int j = 0; j < KEPT * 4; ++j) d[j] = d[i * KEPT * 4 + j];
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], 0;\n@p bra done;\nbra again;\ndone:\n}" ::"r"(bar)
        : "memory");
#pragma unroll
    for (int i = 0; i < SHARE - 1; ++i)
#pragma unroll
        for (int j = 0; j < KEPT; ++j) {
            float a, b, c, e;
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(a), "=f"(b), "=f"(c), "=f"(e) : "r"(mail + (i * KEPT + j) * LETTER) : "memory");
            d[j * 4] += a, d[j * 4 + 1] += b, d[j * 4 + 2] += c, d[j * 4 + 3] += e;
        }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 64, 1)
    wide(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x, u16* out, const u16* bias, int tokens, int outputs, int depth) {
    extern __shared__ __align__(1024) char memory[];
    __shared__ alignas(8) u64 w_bars[2 * STAGES], x_bars[2 * X_STAGES], mail_bar;
    const Ring<STAGES, W_STAGE> w_ring(shared_address(memory), w_bars);
    const Ring<X_STAGES, X_STAGE> x_ring(shared_address(memory) + STAGES * W_STAGE, x_bars);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    asm volatile("griddepcontrol.launch_dependents;");
    const int rank = blockIdx.x % SHARE, tile = blockIdx.x / SHARE, stride = gridDim.x / SHARE;
    const int tiles = (outputs + OUT_ROWS - 1) / OUT_ROWS;
    const int rounds = SHARE > 1 ? 1 : (tiles + stride - 1) / stride;
    const int whole = (depth + 64 * BOXES - 1) / (64 * BOXES), begin = rank * whole / SHARE;
    const int length = (rank + 1) * whole / SHARE - begin, mine = rounds * length;
    if (SHARE > 1) {
        if (threadIdx.x == 0) {
            barrier_init(shared_address(&mail_bar), 1);
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            barrier_expect(shared_address(&mail_bar), (SHARE - 1) * KEPT * 128 * 16);
        }
        __syncwarp();
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    }

    if (warp == WARPS) {
        auto load = [&](int i) {
            const int row = (tile + i / length * stride) * OUT_ROWS, column = (begin + i % length) * 64 * BOXES;
            const u32 to = w_ring.at(i), bar = w_ring.claim(i);
            for (int b = 0; b < BOXES; ++b)
                for (int part = 0; part < (PAIR ? SPLIT : 1); ++part) {
                    const u32 there = to + b * W_BOX + part * PART * 128;
                    copy_box(there, &weight, column + 64 * b, row + part * COPIED, bar, EVICT_FIRST);
                    if (PAIR) copy_box(there + COPIED * 128, &weight, column + 64 * b, outputs + row + part * COPIED, bar, EVICT_FIRST);
                }
        };
        const int ahead = min(mine, STAGES);
        if (lane == 0) {
            w_ring.init();
            for (int i = 0; i < ahead; ++i) load(i);
        }
        __syncwarp();
        __syncthreads();
        if (lane == 0)
            for (int i = ahead; i < mine; ++i) load(i);
        return;
    }
    if (warp == WARPS + 1) {
        if (lane == 0) {
            asm volatile("prefetch.tensormap [%0];" ::"l"(&x) : "memory");
            x_ring.init();
        }
        __syncwarp();
        __syncthreads();
        asm volatile("griddepcontrol.wait;" ::: "memory");
        if (lane == 0)
            for (int i = 0; i < mine; ++i) {
                const u32 to = x_ring.at(i), bar = x_ring.claim(i);
                for (int b = 0; b < BOXES; ++b) copy_box(to + b * X_BOX, &x, ((begin + i % length) * BOXES + b) * 64, 0, bar, EVICT_LAST);
            }
        return;
    }
    __syncthreads();

    const int group = warp / 4, part = group % SPLIT, first_token = group / SPLIT * 64;
    const int token = first_token + warp % 4 * 16 + lane / 4;  // and the eighth after it
    const bool even = outputs % 2 == 0;
    auto release = [&](int i) {
        if (lane == 0) w_ring.release(i), x_ring.release(i);
    };
    if (ADD) asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int round = 0; round < rounds; ++round) {
        const int first = (tile + round * stride) * OUT_ROWS + part * OUT_PART + lane % 4 * 2;
        float d[PART / 2];
        u32 before[ADD ? KEPT : 1][2];  // what is added, of a pair of columns: two rows
#pragma unroll
        for (int j = 0; j < PART / 8; ++j) {
            const int column = first + j * 8 % OUT_PART, n = column + j * 8 / OUT_PART * outputs;
            const bool kept = SHARE == 1 || j / KEPT == rank, low = kept && column < outputs, high = kept && column + 1 < outputs;
            const float a = BIAS && low ? widen(bias[n]) : 0, b = BIAS && high ? widen(bias[n + 1]) : 0;
            d[j * 4] = d[j * 4 + 2] = a, d[j * 4 + 1] = d[j * 4 + 3] = b;
        }
        if (ADD)
#pragma unroll
            for (int j = 0; j < KEPT; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int n = first + (rank * KEPT + j) * 8;
                    const u16* there = out + (u64)(token + half * 8) * outputs + n;
                    const bool low = token + half * 8 < tokens && n < outputs, high = low && n + 1 < outputs;
                    before[j][half] = even ? (low ? *(const u32*)there : 0) : (low ? there[0] : 0) | (high ? (u32)there[1] << 16 : 0);
                }
        for (int i = round * length; i < (round + 1) * length; ++i) {
            w_ring.wait(i);
            x_ring.wait(i);
            const u32 w_at = w_ring.at(i) + part * PART * 128, x_at = x_ring.at(i) + first_token * 128;
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int step = 0; step < BOXES * 4; ++step)
                multiply(d, tile_descriptor(x_at + step / 4 * X_BOX) + step % 4 * 2, tile_descriptor(w_at + step / 4 * W_BOX) + step % 4 * 2);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            if (!LATE) {
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                release(i);
            } else if (i > round * length) {
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                release(i - 1);
            }
        }
        if (LATE) {
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            release((round + 1) * length - 1);
        }
        if (SHARE > 1) exchange(d, shared_address(memory) + STAGES * W_STAGE + X_STAGES * X_STAGE, shared_address(&mail_bar), rank);

        u32 results[KEPT][2];  // before the stores, whose conditions would make one wait for the other
#pragma unroll
        for (int j = 0; j < KEPT; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = j * 4 + half * 2, up = at + (PAIR ? PART / 4 : 0);
                if (ADD) d[at] += widen((u16)before[j][half]), d[at + 1] += widen((u16)(before[j][half] >> 16));
                const u16 low = PAIR ? silu_mul(d[at], d[up]) : narrow(d[at]), high = PAIR ? silu_mul(d[at + 1], d[up + 1]) : narrow(d[at + 1]);
                results[j][half] = low | (u32)high << 16;
            }
#pragma unroll
        for (int j = 0; j < KEPT; ++j) {
            const int n = first + (rank * KEPT + j) * 8;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (token + half * 8 >= tokens || n >= outputs) continue;
                u16* to = out + (u64)(token + half * 8) * outputs + n;
                if (even) {
                    *(u32*)to = results[j][half];
                } else {
                    to[0] = (u16)results[j][half];
                    if (n + 1 < outputs) to[1] = (u16)(results[j][half] >> 16);
                }
            }
        }
    }
}
