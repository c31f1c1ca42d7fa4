// By way of an exponential that cannot overflow.
inline float sigmoid(float x) {
  const float t = precise::exp(-fabs(x));
  return (x < 0.0f ? t : 1.0f) / (1.0f + t);
}
