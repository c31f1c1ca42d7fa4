"""What each kernel computes, in numpy float64, one file a kernel."""
