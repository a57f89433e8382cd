// A batch norm. moco/kernels/norm.py has the same fields.

#pragma once

#include <cstdint>

extern "C" struct Norm {
  int64_t images, pixels, channels, groups;  // pixels of one image
  int64_t threads, relu, evaluating;         // evaluating: by the running statistics, one group
  double eps, momentum;
  const float *weight, *bias;          // [channels]
  float *running_mean, *running_var;   // [channels]
  int64_t* tracked;                    // how many batches the running statistics saw
  float *mean, *var, *scale, *shift;   // [groups, channels]: output = scale * input + shift
};
