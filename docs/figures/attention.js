// The arithmetic of the figures: softmax at once, and block by block with a running maximum, sum and weighted sum.

// Weights of scores: positive, summing to 1.
export function softmax(scores) {
  const most = Math.max(...scores);
  const parts = scores.map((score) => Math.exp(score - most));
  const sum = parts.reduce((a, b) => a + b, 0);
  return parts.map((part) => part / sum);
}

export function dot(a, b) {
  return a.reduce((sum, x, i) => sum + x * b[i], 0);
}

// blocks: [{scores, values}, ...] in the order in which they are read. After each: the maximum m so far, the factor by
// which the old sums shrink, the sum l of exp(score - m), and the sum a of exp(score - m) * value.
export function online(blocks) {
  let [m, l, a] = [-Infinity, 0, 0];
  return blocks.map(({ scores, values }) => {
    const most = Math.max(m, ...scores);
    const factor = Math.exp(m - most); // exp(-Infinity) is 0: there was nothing before
    const parts = scores.map((score) => Math.exp(score - most));
    l = l * factor + parts.reduce((sum, part) => sum + part, 0);
    a = a * factor + dot(parts, values);
    m = most;
    return { m, factor, l, a };
  });
}
