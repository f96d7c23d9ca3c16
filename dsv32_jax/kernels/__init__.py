"""Products with weights as they are stored: the readable reference, the kernels that replace it, the choice of one."""
