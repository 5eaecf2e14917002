// The server counts characters, JavaScript the halves of some of them: an emoji is one there, and two here.

const PAIR = /[\ud800-\udbff][\udc00-\udfff]/g;

/** A function from the server's places in a text to JavaScript's. */
export function places(text) {
  // where the server sees each character that is two here
  const pairs = [];
  for (const { index } of text.matchAll(PAIR)) pairs.push(index - pairs.length);
  if (!pairs.length) return (place) => place;
  return (place) => {
    let low = 0;
    let high = pairs.length; // how many of them begin before the place
    while (low < high) {
      const middle = (low + high) >> 1;
      if (pairs[middle] < place) low = middle + 1;
      else high = middle;
    }
    return place + low;
  };
}
