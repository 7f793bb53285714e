// The copy of one input into its static buffer, and of a held output out of the graph's memory. Compiled twice:
// by the C++ compiler for emulation, and by NVRTC, as text, for the first node of every graph. So it includes nothing.
#pragma once

#ifdef __CUDACC__
#define GRAPHCACHE_INLINE __device__ __forceinline__
#else
#define GRAPHCACHE_INLINE inline
#endif

namespace graphcache {

constexpr int kMaxDims = 6;
constexpr int kThreads = 256;

// Lengths, strides and positions are in bytes. The dimensions go from the outermost to the innermost of
// the static buffer, which is dense in that order.
struct alignas(16) InputCopy {
  unsigned char fill[16]; // an element of a padded row, repeated
  const char* source; // null: the caller gave the static buffer itself, and only padding is written
  char* target;
  long long bytes; // of the static buffer
  long long period; // of the static buffer, for one step of the dimensions outside the batch
  long long given; // of a period, how much the source has; the rest is padding
  long long row; // of one row
  long long strides[kMaxDims]; // of the source, where it is not dense
  unsigned sizes[kMaxDims]; // of the static buffer
  int dims; // 0: the source is dense
  int batch_dim; // -1: no padding
  unsigned batch; // rows that the source has
  int element;
  int unit; // bytes that one thread copies at a time; divides every length and address
  int edge; // padded rows repeat the last one
};

// The common case, in the fewest bytes: patching a node costs about a nanosecond for each. The source is
// dense, and its rows come first: then padding, all of one value, or the last row again.
struct DenseInputCopy {
  const char* source; // as above
  char* target;
  unsigned long long fill;
  unsigned bytes;
  unsigned given;
  unsigned row; // 0: padded rows hold `fill`; else they repeat the last one, of so many bytes
  int unit;
};

// A held output on its way to memory of its own, before the graph overwrites it. At any address, of any length.
struct OutputMove {
  const char* source;
  char* target;
  long long bytes;
};

constexpr int kMoveUnit = 16; // bytes that one thread copies at a time
constexpr int kMaxMoves = 8; // of one launch

struct OutputMoves {
  unsigned count;
  OutputMove moves[kMaxMoves];
};

// Copies the bytes from `position` on, at most a unit of them.
GRAPHCACHE_INLINE void move_unit(const OutputMove& move, long long position) {
  const long long end = position + kMoveUnit < move.bytes ? position + kMoveUnit : move.bytes;
#ifdef __CUDACC__
  const bool aligned = (((unsigned long long)move.source | (unsigned long long)move.target) & (kMoveUnit - 1)) == 0;
  if (aligned && end - position == kMoveUnit) {
    *reinterpret_cast<uint4*>(move.target + position) = *reinterpret_cast<const uint4*>(move.source + position);
    return;
  }
#pragma unroll 1
  for (; position < end; ++position) {
    move.target[position] = move.source[position];
  }
#else
  __builtin_memcpy(move.target + position, move.source + position, end - position);
#endif
}

// Returns the source of the bytes at `position` of the static buffer; null: they stay.
GRAPHCACHE_INLINE const char* origin(const InputCopy& input, long long position) {
  if (input.dims == 0) {
    const char* source = input.source;
    long long start = 0;
    if (input.period != input.bytes) {
      const long long outer = position / input.period;
      start = outer * input.period;
      source = source == nullptr ? nullptr : source + outer * input.given;
    }
    long long within = position - start;
    if (within < input.given) {
      return source == nullptr ? nullptr : source + within;
    }
    if (!input.edge) {
      return reinterpret_cast<const char*>(input.fill) + (position & 15);
    }
    within = input.given - input.row + (within - input.given) % input.row;
    return (source == nullptr ? input.target + start : source) + within;
  }
  long long index = position / input.element;
  long long offset = 0;
#ifdef __CUDACC__
#pragma unroll 1
#endif
  for (int dim = input.dims - 1; dim >= 0; --dim) {
    const long long rest = index / input.sizes[dim];
    long long at = index - rest * input.sizes[dim];
    index = rest;
    if (dim == input.batch_dim && at >= input.batch) {
      if (!input.edge) {
        return reinterpret_cast<const char*>(input.fill) + (position & 15);
      }
      at = input.batch - 1;
    }
    offset += at * input.strides[dim];
  }
  return input.source + offset;
}

#ifdef __CUDACC__

template <typename Copy>
struct Inputs {
  Copy inputs[GRAPHCACHE_CAPACITY];
};

template <typename Unit>
__device__ __forceinline__ void copy(const char* from, char* to) {
  *reinterpret_cast<Unit*>(to) = *reinterpret_cast<const Unit*>(from);
}

__device__ __forceinline__ void copy_unit(const char* from, char* to, int unit) {
  switch (unit) {
    case 16: copy<uint4>(from, to); break;
    case 8: copy<unsigned long long>(from, to); break;
    case 4: copy<unsigned>(from, to); break;
    case 2: copy<unsigned short>(from, to); break;
    default: *to = *from;
  }
}

// A row of blocks for each input, and one for each output that moves. The first call waits for the compiler: so no
// loop is unrolled, a kernel less is a kernel gained, and only the common case has one without moves.

__device__ __forceinline__ void copy_in(const DenseInputCopy& input) {
  const unsigned long long step = (unsigned long long)gridDim.x * kThreads * input.unit;
  unsigned long long position = (blockIdx.x * kThreads + threadIdx.x) * (unsigned long long)input.unit;
  unsigned long long fill[2] = {0, input.fill};
#pragma unroll 1
  for (; position < input.bytes; position += step) {
    const char* from = input.source;
    if (position < input.given) {
      if (from == nullptr) {
        continue;
      }
      from += position;
    } else if (input.row != 0) {
      const unsigned within = input.given - input.row + ((unsigned)position - input.given) % input.row;
      from = (from == nullptr ? input.target : from) + within;
    } else {
      fill[0] = input.fill >> (8 * (position & 7));
      from = reinterpret_cast<const char*>(fill);
    }
    copy_unit(from, input.target + position, input.unit);
  }
}

__device__ __forceinline__ void copy_in(const InputCopy& input) {
  const long long step = (long long)gridDim.x * kThreads * input.unit;
  long long position = (blockIdx.x * kThreads + threadIdx.x) * (long long)input.unit;
#pragma unroll 1
  for (; position < input.bytes; position += step) {
    const char* from = origin(input, position);
    if (from != nullptr) {
      copy_unit(from, input.target + position, input.unit);
    }
  }
}

__device__ __forceinline__ void move_out(const OutputMove& move) {
  const long long step = (long long)gridDim.x * kThreads * kMoveUnit;
  long long position = (blockIdx.x * kThreads + threadIdx.x) * (long long)kMoveUnit;
#pragma unroll 1
  for (; position < move.bytes; position += step) {
    move_unit(move, position);
  }
}

extern "C" __global__ void graphcache_copy_in_dense(const __grid_constant__ Inputs<DenseInputCopy> dense) {
  copy_in(dense.inputs[blockIdx.y]);
}

extern "C" __global__ void graphcache_move_dense(
    const __grid_constant__ Inputs<DenseInputCopy> dense, const __grid_constant__ OutputMoves moves) {
  if (blockIdx.y < moves.count) {
    move_out(moves.moves[blockIdx.y]);
  } else {
    copy_in(dense.inputs[blockIdx.y - moves.count]);
  }
}

extern "C" __global__ void graphcache_copy_in(
    const __grid_constant__ Inputs<InputCopy> strided, const __grid_constant__ OutputMoves moves) {
  if (blockIdx.y < moves.count) {
    move_out(moves.moves[blockIdx.y]);
  } else {
    copy_in(strided.inputs[blockIdx.y - moves.count]);
  }
}

#endif

} // namespace graphcache
