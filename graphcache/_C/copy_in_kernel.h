// The copy of one input into its static buffer. Compiled twice: by the C++ compiler for emulation, and by
// NVRTC, as text, for the first node of every captured graph. So it includes nothing.
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

// A row of blocks for each input. No loop is unrolled: the first call waits for the compiler.

extern "C" __global__ void graphcache_copy_in_dense(const __grid_constant__ Inputs<DenseInputCopy> dense) {
  const DenseInputCopy& input = dense.inputs[blockIdx.y];
  const unsigned long long step = (unsigned long long)gridDim.x * kThreads * input.unit;
  unsigned long long position = (blockIdx.x * kThreads + threadIdx.x) * (unsigned long long)input.unit;
#pragma unroll 1
  for (; position < input.bytes; position += step) {
    if (position >= input.given && input.row != 0) {
      const char* source = input.source == nullptr ? input.target : input.source;
      const unsigned long long within = input.given - input.row + (position - input.given) % input.row;
      copy_unit(source + within, input.target + position, input.unit);
    } else if (position >= input.given) {
      const unsigned long long fill[2] = {input.fill >> (8 * (position & 7)), input.fill};
      copy_unit(reinterpret_cast<const char*>(fill), input.target + position, input.unit);
    } else if (input.source != nullptr) {
      copy_unit(input.source + position, input.target + position, input.unit);
    }
  }
}

extern "C" __global__ void graphcache_copy_in(const __grid_constant__ Inputs<InputCopy> strided) {
  const InputCopy& input = strided.inputs[blockIdx.y];
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

#endif

} // namespace graphcache
