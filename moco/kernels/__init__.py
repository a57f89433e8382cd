"""C++ for CPUs, compiled for this machine when it is first used (`TRAIN.COMPILE kernels`)."""
