// Which passages stand behind which sentence of an answer, and by which number.

const NAMED = 0.5; // of the weight of the sentence's first passage: from there on another one is named too
const MOST = 3;

/** Whose passage it is: a file's, or a document's of a set. */
export function origin(citation) {
  return citation.file_id ?? `set:${citation.document}`;
}

/** Sentences with the passages that each names. Equal passages have equal numbers, counted from 1 as they come. */
export function numbered(sentences) {
  const numbers = new Map();
  return sentences.map(({ start, end, citations }) => {
    const most = citations[0]?.weight ?? 0;
    const named = citations.filter((found) => found.weight > 0 && found.weight >= NAMED * most).slice(0, MOST);
    const passages = named.map((found) => {
      const key = JSON.stringify([origin(found), found.start, found.end]);
      if (!numbers.has(key)) numbers.set(key, numbers.size + 1);
      return { number: numbers.get(key), citation: found };
    });
    passages.sort((one, other) => one.number - other.number);
    return { start, end, citations, passages };
  });
}

/** Shares of a document's chunks: those of one sentence, or the mean over several. */
export function weightsOf(sentences, document) {
  const weights = new Map();
  for (const { citations } of sentences) {
    for (const found of citations) {
      if (origin(found) !== document) continue;
      weights.set(found.chunk, (weights.get(found.chunk) ?? 0) + found.weight / sentences.length);
    }
  }
  return weights;
}
