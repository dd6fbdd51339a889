// out[M, N] = x[M, K] · weight[N, K]ᵀ (+ bias) for 64 to 256 rows of x: all of them against ROWS rows of the weight in one block, by wgmma.
//
// x is the 64-row operand (one warpgroup for each 64 rows), the weight's rows are the columns: any multiple of 8 fits, so that N is cut
// into equal shares for the SMs. One warp copies tiles into a ring of STAGES buffers, the weight's first ones before the previous kernel
// has ended.
// PAIR: the weight is [gate; up]; the block takes ROWS / 2 of each and stores silu(gate) · up.
// ADD: what out holds is added.
// Compiled at run time after common.cuh and multiply(): ROWS TOKENS BOXES STAGES PAIR ADD BIAS HALF (macros, integers).

constexpr int GROUPS = TOKENS / 64, WARPS = GROUPS * 4;
constexpr u32 W_BOX = ROWS * 128, X_BOX = TOKENS * 128, STAGE = BOXES * (W_BOX + X_BOX);
constexpr int OUT_ROWS = PAIR ? ROWS / 2 : ROWS;
constexpr int COLUMNS = OUT_ROWS / 8;
static_assert(ROWS % (PAIR ? 16 : 8) == 0 && ROWS <= 256 && TOKENS % 64 == 0 && TOKENS <= 256);

// A K-major tile of rows of 64 elements, swizzled by 128 bytes: eight rows are 1024 bytes apart.
__device__ __forceinline__ u64 tile_descriptor(u32 address) { return (u64)((address & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32, 1)
    wide(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x, u16* out, const u16* bias, int tokens, int outputs, int depth) {
    extern __shared__ __align__(1024) char memory[];
    __shared__ alignas(8) u64 bars[2 * STAGES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 ring = shared_address(memory), full = shared_address(bars), empty = full + 8 * STAGES;
    asm volatile("griddepcontrol.launch_dependents;");
    const int tiles = (outputs + OUT_ROWS - 1) / OUT_ROWS;
    const int rounds = (tiles + gridDim.x - 1) / gridDim.x;
    const int length = (depth + 64 * BOXES - 1) / (64 * BOXES);

    if (warp == WARPS) {
        const int mine = rounds * length, ahead = min(mine, STAGES);
        auto load_weight = [&](int i) {
            const int slot = i % STAGES, row = (blockIdx.x + i / length * gridDim.x) * OUT_ROWS, column = i % length * 64 * BOXES;
            const u32 to = ring + slot * STAGE, bar = full + 8 * slot;
            barrier_expect(bar, STAGE);
            for (int b = 0; b < BOXES; ++b) {
                copy_box(to + b * W_BOX, &weight, column + 64 * b, row, bar, EVICT_FIRST);
                if (PAIR) copy_box(to + b * W_BOX + W_BOX / 2, &weight, column + 64 * b, outputs + row, bar, EVICT_FIRST);
            }
        };
        auto load_x = [&](int i) {
            const int slot = i % STAGES, column = i % length * 64 * BOXES;
            const u32 to = ring + slot * STAGE + BOXES * W_BOX, bar = full + 8 * slot;
            for (int b = 0; b < BOXES; ++b) copy_box(to + b * X_BOX, &x, column + 64 * b, 0, bar, EVICT_LAST);
        };
        if (lane == 0) {
            for (int i = 0; i < STAGES; ++i) {
                barrier_init(full + 8 * i, 1);
                barrier_init(empty + 8 * i, WARPS);
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            for (int i = 0; i < ahead; ++i) load_weight(i);
        }
        __syncwarp();
        __syncthreads();
        if (lane == 0) {
            asm volatile("griddepcontrol.wait;" ::: "memory");
            for (int i = 0; i < ahead; ++i) load_x(i);
            for (int i = ahead; i < mine; ++i) {
                barrier_wait(empty + 8 * (i % STAGES), (i / STAGES - 1) & 1);
                load_weight(i);
                load_x(i);
            }
        }
        return;
    }
    __syncthreads();

    const int group = warp / 4;
    auto release = [&](int slot) {
        if (lane == 0) barrier_arrive(empty + 8 * slot);
    };
    int done = 0;
    for (int round = 0; round < rounds; ++round) {
        float d[ROWS / 2];
        for (int i = 0; i < length; ++i, ++done) {
            const int slot = done % STAGES;
            const u32 w_at = ring + slot * STAGE, x_at = w_at + BOXES * W_BOX + group * 64 * 128;
            barrier_wait(full + 8 * slot, (done / STAGES) & 1);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int step = 0; step < BOXES * 4; ++step)
                multiply(d, tile_descriptor(x_at + step / 4 * X_BOX) + step % 4 * 2, tile_descriptor(w_at + step / 4 * W_BOX) + step % 4 * 2, i | step);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            if (i > 0) {
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                release((done - 1) % STAGES);
            }
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        release((done - 1) % STAGES);

        if (ADD) asm volatile("griddepcontrol.wait;" ::: "memory");
        const int row = (blockIdx.x + round * gridDim.x) * OUT_ROWS, token = group * 64 + warp % 4 * 16 + lane / 4;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
            const int n = row + j * 8 + lane % 4 * 2;
            float b[4] = {};
            if (BIAS) {
                if (n < outputs) b[0] = widen(bias[n]), b[2] = PAIR ? widen(bias[outputs + n]) : 0;
                if (n + 1 < outputs) b[1] = widen(bias[n + 1]), b[3] = PAIR ? widen(bias[outputs + n + 1]) : 0;
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = j * 4 + half * 2, up = at + (PAIR ? COLUMNS * 4 : 0);
                const bool inside = token + half * 8 < tokens && n < outputs;
                u16* to = out + (u64)(token + half * 8) * outputs + n;
                if (ADD && inside) {
                    d[at] += widen(to[0]);
                    if (n + 1 < outputs) d[at + 1] += widen(to[1]);
                }
                const u16 low = PAIR ? silu_mul(d[at] + b[0], d[up] + b[2]) : narrow(d[at] + b[0]);
                const u16 high = PAIR ? silu_mul(d[at + 1] + b[1], d[up + 1] + b[3]) : narrow(d[at + 1] + b[1]);
                if (!inside) continue;
                if (outputs % 2 == 0) {
                    *(u32*)to = low | (u32)high << 16;
                } else {
                    to[0] = low;
                    if (n + 1 < outputs) to[1] = high;
                }
            }
        }
    }
}
