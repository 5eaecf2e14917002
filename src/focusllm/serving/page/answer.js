// One answer: text as it comes, then its sentences with their passages, and where the model looked.

import { places } from "./characters.js";
import { numbered, origin, weightsOf } from "./citations.js";
import { counted, element, percent } from "./dom.js";
import { Strip } from "./strip.js";

const MOST_STRIPS = 8;
const LAST_WORD = /\S{1,16}$/; // stays in a line with the numbers behind it

export class Answer {
  /** `documents`: whose contents the strips show; `open(citation, number)` shows a passage. */
  constructor(title, documents, open) {
    this.documents = documents;
    this.open = open;
    this.text = "";
    this.status = element("p", { class: "status", role: "status" }, "Waits for the model …");
    this.body = element("div", { class: "said" });
    this.foot = element("footer");
    this.title = element("h3");
    this.root = element(
      "article",
      { class: "answer", "aria-busy": "true" },
      ...[this.title, this.status, this.body, this.foot],
    );
    this.rename(title);
  }

  /** Say what kind of answer it is. */
  rename(title) {
    this.title.textContent = title;
    this.root.setAttribute("aria-label", title);
  }

  /** Take an event of the stream. */
  take({ choices, prompt_progress: progress, usage }) {
    if (usage) this.usage = usage;
    if (progress && progress.processed < progress.total)
      this.status.textContent = `Reads: ${percent(progress.processed / progress.total)}`;
    const delta = choices[0]?.delta;
    if (delta?.content) this.#say(delta.content);
    if (delta?.sentences) this.sentences = delta.sentences;
  }

  #say(piece) {
    this.text += piece;
    this.status.textContent = "";
    this.body.append(piece);
  }

  /** The stream is over. */
  async finish(files) {
    this.#end(this.text.trim() ? "" : "The model said nothing.");
    if (this.usage) this.foot.append(element("small", { class: "usage" }, this.#cost()));
    const sentences = numbered(this.sentences ?? []);
    if (sentences.some(({ passages }) => passages.length)) {
      this.#mark(sentences);
      await this.#strips(sentences, files);
    }
  }

  /** It went wrong, or was stopped. */
  fail(message, isError = true) {
    this.#end(message);
    this.status.classList.toggle("error", isError);
  }

  #end(words) {
    this.status.textContent = words;
    this.root.setAttribute("aria-busy", "false");
  }

  #cost() {
    const { prompt_tokens: prompt, completion_tokens: said, prompt_tokens_details: details } = this.usage;
    const kept = details?.cached_tokens;
    const before = kept ? ` (${kept.toLocaleString("en")} of them before)` : "";
    return `${counted(said, "token")} written, ${prompt.toLocaleString("en")} read${before}`;
  }

  /** Put sentences into the text's place, each with buttons for its passages. */
  #mark(sentences) {
    const at = places(this.text);
    const parts = [];
    let place = 0;
    for (const sentence of sentences) {
      const [start, end] = [at(sentence.start), at(sentence.end)];
      const buttons = sentence.passages.map(({ number, citation }) => this.#button(number, citation));
      const words = this.text.slice(start, end);
      const [last] = words.match(LAST_WORD) ?? [""];
      const together = element("span", { class: "together" }, last, ...buttons);
      const part = element("span", { class: "sentence" }, words.slice(0, words.length - last.length), together);
      const show = () => this.#look(sentence, part);
      const rest = () => this.#look(null);
      part.addEventListener("pointerenter", show);
      part.addEventListener("pointerleave", rest);
      part.addEventListener("focusin", show);
      part.addEventListener("focusout", rest);
      parts.push(this.text.slice(place, start), part);
      place = end;
    }
    this.body.replaceChildren(...parts, this.text.slice(place));
  }

  #button(number, citation) {
    const where = [citation.document, citation.part].filter(Boolean).join(", ");
    return element(
      "button",
      {
        type: "button",
        class: "citation",
        title: `${where} (${percent(citation.weight)})`,
        "aria-label": `Passage ${number}, ${where}`,
        onclick: () => this.open(citation, number),
      },
      `[${number}]`,
    );
  }

  /** A strip for each file that was asked; of many, for those that were looked at. */
  async #strips(sentences, files) {
    this.marked = sentences;
    const cited = new Map(sentences.flatMap(({ citations }) => citations).map((found) => [origin(found), found]));
    const shown = files.length > MOST_STRIPS ? files.filter(({ id }) => cited.has(id)) : files;
    const contents = await Promise.allSettled(shown.map(({ id }) => this.documents.content(id)));
    const strips = new Map();
    const rows = [];
    contents.forEach(({ value }, index) => {
      if (!value?.chunks.length) return; // it is gone meanwhile
      const { id, name } = shown[index];
      const open = (start, end) => this.open({ file_id: id, document: name, place: { start, end } });
      const strip = new Strip(name, value.chunks, open);
      strips.set(id, strip);
      rows.push(element("div", { class: "strip-row" }, element("span", { class: "strip-name" }, name), strip.root));
    });
    if (!rows.length) return;
    this.strips = strips;
    this.caption = element("p", { class: "caption" });
    this.foot.prepend(element("section", { class: "looked" }, this.caption, ...rows));
    this.#look(null);
  }

  /** Show in the strips where the model looked for a sentence; null: for all of them. */
  #look(sentence, part) {
    for (const other of this.body.querySelectorAll(".sentence.shown")) other.classList.remove("shown");
    part?.classList.add("shown");
    if (!this.strips) return;
    this.caption.textContent = sentence
      ? "Where the model looked while it wrote this sentence"
      : "Where the model looked";
    const rows = [...this.strips].map(([id, strip]) => [strip, weightsOf(sentence ? [sentence] : this.marked, id)]);
    const most = Math.max(...rows.flatMap(([, weights]) => [...weights.values()]));
    for (const [strip, weights] of rows) strip.show(weights, most);
  }
}
