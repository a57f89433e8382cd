// Non-maximum suppression of boxes that come best first, until enough are kept.
//
// A box is compared with the boxes kept before it, many at once. The arithmetic is torchvision's
// (ops/cpu/nms_kernel.cpp), operation by operation, so the same boxes are kept.
//
// moco/kernels/nms.py calls this file.

// A sum that is joined with a product rounds differently.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t kTogether = 64;

struct Kept {
  std::vector<float> x0, y0, x1, y1, area;

  void add(const float* box, float box_area) {
    x0.push_back(box[0]);
    y0.push_back(box[1]);
    x1.push_back(box[2]);
    y1.push_back(box[3]);
    area.push_back(box_area);
  }

  // Whether the intersection over union with one of them is above the threshold.
  bool overlap(const float* box, float box_area, float threshold) const {
    const int64_t num = int64_t(area.size());
    for (int64_t begin = 0; begin < num; begin += kTogether) {
      const int64_t end = std::min(num, begin + kTogether);
      int32_t any = 0;
#pragma omp simd reduction(| : any)
      for (int64_t i = begin; i < end; i++) {
        const float left = x0[i] > box[0] ? x0[i] : box[0];
        const float top = y0[i] > box[1] ? y0[i] : box[1];
        const float right = x1[i] < box[2] ? x1[i] : box[2];
        const float bottom = y1[i] < box[3] ? y1[i] : box[3];
        const float width = right - left > 0.0f ? right - left : 0.0f;
        const float height = bottom - top > 0.0f ? bottom - top : 0.0f;
        const float both = width * height;
        any |= both / (area[i] + box_area - both) > threshold;
      }
      if (any) return true;
    }
    return false;
  }
};

}  // namespace

extern "C" {

// boxes: [num, 4]. kept: room for min(num, most) indices. Returns how many were kept.
int64_t nms(int64_t num, int64_t most, double threshold, const float* boxes, int64_t* kept) {
  // The largest float that is not above the threshold: a float is above both or neither.
  float limit = float(threshold);
  if (double(limit) > threshold) limit = std::nextafter(limit, -INFINITY);
  Kept before;
  int64_t count = 0;
  for (int64_t i = 0; i < num && count < most; i++) {
    const float* box = boxes + 4 * i;
    const float area = (box[2] - box[0]) * (box[3] - box[1]);
    if (before.overlap(box, area, limit)) continue;
    before.add(box, area);
    kept[count++] = i;
  }
  return count;
}
}
