// out[M, N] = x[M, K] · weight[N, K]ᵀ (+ bias) for 64 to 256 rows of x: all of them against ROWS rows of the weight in one block, by wgmma.
//
// x is the 64-row operand, the weight's rows are the columns: any multiple of 8 fits, so that N is cut into equal shares for the SMs. A
// warpgroup multiplies 64 rows of x with ROWS / SPLIT of the weight's.
// Two warps copy tiles into rings, one the weight's, the first ones before the previous kernel has ended (they depend on no kernel), the
// other x's. A buffer is free once it is multiplied; LATE: once the next one is begun, where the tensor cores are what is waited for.
// PAIR: the weight is [gate; up]; the block takes ROWS / 2 of each and stores silu(gate) · up.
// ADD: what out holds is added. It and the bias are what the sums begin with, so that nothing is fetched at the end.
// Compiled at run time after common.cuh and multiply(): ROWS TOKENS SPLIT BOXES STAGES X_STAGES LATE PAIR ADD BIAS HALF (macros, integers).

constexpr int WARPS = TOKENS / 64 * SPLIT * 4;
constexpr int PART = ROWS / SPLIT;              // columns of a warpgroup: with PAIR, half of them gate and half up
constexpr int COPIED = PAIR ? PART / 2 : ROWS;  // rows of a box
constexpr int OUT_ROWS = PAIR ? ROWS / 2 : ROWS, OUT_PART = OUT_ROWS / SPLIT;
constexpr u32 W_BOX = ROWS * 128, X_BOX = TOKENS * 128, W_STAGE = BOXES * W_BOX, X_STAGE = BOXES * X_BOX;
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

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 64, 1)
    wide(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x, u16* out, const u16* bias, int tokens, int outputs, int depth) {
    extern __shared__ __align__(1024) char memory[];
    __shared__ alignas(8) u64 w_bars[2 * STAGES], x_bars[2 * X_STAGES];
    const Ring<STAGES, W_STAGE> w_ring(shared_address(memory), w_bars);
    const Ring<X_STAGES, X_STAGE> x_ring(shared_address(memory) + STAGES * W_STAGE, x_bars);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    asm volatile("griddepcontrol.launch_dependents;");
    const int tiles = (outputs + OUT_ROWS - 1) / OUT_ROWS;
    const int rounds = (tiles + gridDim.x - 1) / gridDim.x;
    const int length = (depth + 64 * BOXES - 1) / (64 * BOXES), mine = rounds * length;

    if (warp == WARPS) {
        auto load = [&](int i) {
            const int row = (blockIdx.x + i / length * gridDim.x) * OUT_ROWS, column = i % length * 64 * BOXES;
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
            x_ring.init();
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            for (int i = 0; i < ahead; ++i) load(i);
        }
        __syncwarp();
        __syncthreads();
        if (lane == 0)
            for (int i = ahead; i < mine; ++i) load(i);
        return;
    }
    if (warp == WARPS + 1) {
        asm volatile("prefetch.tensormap [%0];" ::"l"(&x) : "memory");
        __syncthreads();
        asm volatile("griddepcontrol.wait;" ::: "memory");
        if (lane == 0)
            for (int i = 0; i < mine; ++i) {
                const u32 to = x_ring.at(i), bar = x_ring.claim(i);
                for (int b = 0; b < BOXES; ++b) copy_box(to + b * X_BOX, &x, (i % length * BOXES + b) * 64, 0, bar, EVICT_LAST);
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
        const int first = (blockIdx.x + round * gridDim.x) * OUT_ROWS + part * OUT_PART + lane % 4 * 2;
        float d[PART / 2];
#pragma unroll
        for (int j = 0; j < PART / 8; ++j) {
            const int column = first + j * 8 % OUT_PART, n = column + j * 8 / OUT_PART * outputs;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const bool low = column < outputs, high = column + 1 < outputs, real = token + half * 8 < tokens;
                float &a = d[j * 4 + half * 2], &b = d[j * 4 + half * 2 + 1];
                a = BIAS && low ? widen(bias[n]) : 0;
                b = BIAS && high ? widen(bias[n + 1]) : 0;
                if (ADD && real && low) {
                    const u16* before = out + (u64)(token + half * 8) * outputs + n;
                    const u32 both = even ? *(const u32*)before : before[0] | (high ? (u32)before[1] << 16 : 0);
                    a += widen((u16)both), b += widen((u16)(both >> 16));
                }
            }
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

#pragma unroll
        for (int j = 0; j < OUT_PART / 8; ++j) {
            const int n = first + j * 8;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (token + half * 8 >= tokens || n >= outputs) continue;
                const int at = j * 4 + half * 2, up = at + (PAIR ? PART / 4 : 0);
                const u16 low = PAIR ? silu_mul(d[at], d[up]) : narrow(d[at]), high = PAIR ? silu_mul(d[at + 1], d[up + 1]) : narrow(d[at + 1]);
                u16* to = out + (u64)(token + half * 8) * outputs + n;
                if (even) {
                    *(u32*)to = low | (u32)high << 16;
                } else {
                    to[0] = low;
                    if (n + 1 < outputs) to[1] = high;
                }
            }
        }
    }
}
