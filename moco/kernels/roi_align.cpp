// RoIAlign of channels-last features, forward and backward, for tensors of float or bfloat16.
//
// A bin is the mean of bilinear samples on a grid in it. The weights of a sample are a product of
// one for its row and one for its column, so a region is two sparse products: of the bins' rows
// with the features' rows, then of their columns. Sums are float.
//
// moco/kernels/roi_align.py calls this file; `RoiAlign` has the same fields there.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bfloat16.h"

extern "C" struct RoiAlign {
  int64_t images, channels, height, width;  // of the features
  int64_t regions, side;                    // the result is [regions, side, side, channels]
  int64_t sampling;                         // samples a bin and axis; 0: one a pixel, rounded up
  int64_t aligned;                          // pixels are at .5, not at whole numbers
  int64_t threads;
  double scale;                             // pixels of the features in one of the boxes
  const float* rois;                        // [regions, 5]: image, x0, y0, x1, y1
};

namespace {

// torchvision multiplies and adds apart, and a sample is cut off at exactly -1 and `pixels`: the
// places of samples must be rounded as there (fused, 15 of 48,000 random regions differ).
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

// The bins of one axis: bin i is the sum of weights(i)[j] * pixel first[i] + j, j < num[i].
class Bins {
 public:
  Bins(float from, float to, int64_t pixels, const RoiAlign& l) : first(l.side), num(l.side) {
    const float offset = l.aligned ? 0.5f : 0.0f, scale = float(l.scale);
    const float start = from * scale - offset;
    float length = to * scale - offset - start;
    if (!l.aligned) length = std::max(length, 1.0f);
    const float bin = length / float(l.side);
    // A bin that is no longer than nothing, or no number, has no samples.
    const bool is_empty = !(bin > 0.0f && std::isfinite(bin));
    const int64_t samples = l.sampling > 0 ? l.sampling : is_empty ? 0 : int64_t(std::ceil(bin));
    begin_.assign(l.side + 1, 0);
    for (int64_t i = 0; i < l.side; i++) {
      first[i] = pixels;
      int64_t end = 0;
      for_samples(i, start, bin, samples, pixels, [&](int64_t low, int64_t high, float) {
        first[i] = std::min(first[i], low);
        end = std::max(end, high + 1);
      });
      num[i] = std::max<int64_t>(end - first[i], 0);
      begin_[i + 1] = begin_[i] + num[i];
      weights_.resize(begin_[i + 1], 0.0f);
      float* weights = weights_.data() + begin_[i];
      const float share = 1.0f / float(std::max<int64_t>(samples, 1));
      for_samples(i, start, bin, samples, pixels, [&](int64_t low, int64_t high, float upper) {
        weights[low - first[i]] += (1.0f - upper) * share;
        weights[high - first[i]] += upper * share;
      });
      if (num[i]) lowest = std::min(lowest, first[i]), highest = std::max(highest, end);
    }
  }

  const float* weights(int64_t bin) const { return weights_.data() + begin_[bin]; }

  std::vector<int64_t> first, num;
  int64_t lowest = INT64_MAX, highest = 0;  // pixels that any bin sees: from lowest to highest - 1

 private:
  // Calls with(pixel, next pixel, weight of the next one) for the samples that see a pixel.
  template <class With>
  static void for_samples(int64_t bin_index, float start, float bin, int64_t samples,
                          int64_t pixels, With with) {
    for (int64_t i = 0; i < samples; i++) {
      float at = start + bin_index * bin + (i + 0.5f) * bin / float(samples);
      if (!(at >= -1.0f && at <= float(pixels))) continue;
      at = std::max(at, 0.0f);
      const int64_t low = std::min(int64_t(at), pixels - 1);
      const int64_t high = std::min(low + 1, pixels - 1);
      with(low, high, low == high ? 0.0f : at - float(low));
    }
  }

  std::vector<int64_t> begin_;
  std::vector<float> weights_;
};
#if defined(__clang__)
#pragma STDC FP_CONTRACT DEFAULT
#else
#pragma GCC pop_options
#endif

struct Region {
  int64_t image;
  Bins rows, columns;
};

std::vector<Region> regions_of(const RoiAlign& l) {
  std::vector<Region> regions;
  regions.reserve(l.regions);
  for (int64_t r = 0; r < l.regions; r++) {
    const float* roi = l.rois + 5 * r;
    regions.push_back({int64_t(roi[0]), Bins(roi[2], roi[4], l.height, l),
                       Bins(roi[1], roi[3], l.width, l)});
  }
  return regions;
}

// Channels that are computed at once: their sums stay in the cache.
constexpr int64_t kForward = 128, kBackward = 32;

template <class T>
void forward(const RoiAlign& l, const T* features, T* out) {
  const std::vector<Region> regions = regions_of(l);
#pragma omp parallel num_threads(l.threads)
  {
    std::vector<float> row(l.width * kForward), sum(kForward);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < l.regions; r++) {
      const Region& region = regions[r];
      const Bins &rows = region.rows, &columns = region.columns;
      const T* image = features + region.image * l.height * l.width * l.channels;
      for (int64_t c = 0; c < l.channels; c += kForward) {
        const int64_t num = std::min(kForward, l.channels - c);
        for (int64_t i = 0; i < l.side; i++) {
          for (int64_t x = columns.lowest; x < columns.highest; x++) {
            float* to = &row[x * kForward];
            std::fill(to, to + num, 0.0f);
            for (int64_t j = 0; j < rows.num[i]; j++) {
              const float weight = rows.weights(i)[j];
              const T* from = image + ((rows.first[i] + j) * l.width + x) * l.channels + c;
#pragma omp simd
              for (int64_t k = 0; k < num; k++) to[k] += weight * load(from[k]);
            }
          }
          for (int64_t j = 0; j < l.side; j++) {
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (int64_t x = 0; x < columns.num[j]; x++) {
              const float weight = columns.weights(j)[x];
              const float* from = &row[(columns.first[j] + x) * kForward];
#pragma omp simd
              for (int64_t k = 0; k < num; k++) sum[k] += weight * from[k];
            }
            T* to = out + ((r * l.side + i) * l.side + j) * l.channels + c;
#pragma omp simd
            for (int64_t k = 0; k < num; k++) store(to[k], sum[k]);
          }
        }
      }
    }
  }
}

// A thread has some channels of an image to itself, so that every sum has one order, whatever the
// number of threads.
template <class T>
void backward(const RoiAlign& l, const T* dout, T* dfeatures) {
  const std::vector<Region> regions = regions_of(l);
  const int64_t pixels = l.height * l.width, parts = (l.channels + kBackward - 1) / kBackward;
#pragma omp parallel num_threads(l.threads)
  {
    std::vector<float> image(pixels * kBackward), row(l.width * kBackward);
#pragma omp for schedule(static)
    for (int64_t part = 0; part < l.images * parts; part++) {
      const int64_t number = part / parts, c = part % parts * kBackward;
      const int64_t num = std::min(kBackward, l.channels - c);
      std::fill(image.begin(), image.end(), 0.0f);
      for (int64_t r = 0; r < l.regions; r++) {
        const Region& region = regions[r];
        const Bins &rows = region.rows, &columns = region.columns;
        if (region.image != number || columns.highest == 0) continue;
        for (int64_t i = 0; i < l.side; i++) {
          if (!rows.num[i]) continue;
          std::fill(&row[columns.lowest * kBackward], row.data() + columns.highest * kBackward,
                    0.0f);
          for (int64_t j = 0; j < l.side; j++) {
            const T* from = dout + ((r * l.side + i) * l.side + j) * l.channels + c;
            for (int64_t x = 0; x < columns.num[j]; x++) {
              const float weight = columns.weights(j)[x];
              float* to = &row[(columns.first[j] + x) * kBackward];
#pragma omp simd
              for (int64_t k = 0; k < num; k++) to[k] += weight * load(from[k]);
            }
          }
          for (int64_t y = 0; y < rows.num[i]; y++) {
            const float weight = rows.weights(i)[y];
            const float* from = row.data();
            float* to = image.data() + (rows.first[i] + y) * l.width * kBackward;
            const int64_t begin = columns.lowest * kBackward, end = columns.highest * kBackward;
#pragma omp simd
            for (int64_t k = begin; k < end; k++) to[k] += weight * from[k];
          }
        }
      }
      for (int64_t pixel = 0; pixel < pixels; pixel++) {
        T* to = dfeatures + (number * pixels + pixel) * l.channels + c;
#pragma omp simd
        for (int64_t k = 0; k < num; k++) store(to[k], image[pixel * kBackward + k]);
      }
    }
  }
}

}  // namespace

extern "C" {

void roi_align_float32(const RoiAlign* l, const void* features, void* out) {
  forward(*l, static_cast<const float*>(features), static_cast<float*>(out));
}

void roi_align_bfloat16(const RoiAlign* l, const void* features, void* out) {
  forward(*l, static_cast<const bfloat16*>(features), static_cast<bfloat16*>(out));
}

void roi_align_backward_float32(const RoiAlign* l, const void* dout, void* dfeatures) {
  backward(*l, static_cast<const float*>(dout), static_cast<float*>(dfeatures));
}

void roi_align_backward_bfloat16(const RoiAlign* l, const void* dout, void* dfeatures) {
  backward(*l, static_cast<const bfloat16*>(dout), static_cast<bfloat16*>(dfeatures));
}
}
