// A document's text, at a passage that is marked; a document that is text can be edited.

import { byId, element } from "./dom.js";

const PART = 8000; // characters of an element: what is out of sight is not laid out
const WIDE = "(min-width: 75rem)"; // where there is room beside the conversation

export class Reader {
  /** `documents`: whose contents are shown. */
  constructor(documents) {
    this.documents = documents;
    this.dialog = byId("reader");
    byId("close").addEventListener("click", () => this.close());
    byId("edit").addEventListener("click", () => this.#edit());
    byId("cancel").addEventListener("click", () => this.#stopEditing());
    byId("editor").addEventListener("submit", (event) => this.#save(event));
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.defaultPrevented) return;
      event.preventDefault();
      if (byId("editor").hidden) this.close();
      else this.#stopEditing();
    });
    matchMedia(WIDE).addEventListener("change", () => this.dialog.open && this.#present());
  }

  /** Show a document of ours from its start. */
  openEntry(entry) {
    return this.openCitation({ file_id: entry.id, document: entry.name });
  }

  /**
   * Show a passage: {file_id, document, part, start, end, text} as the server cites, or with `place`, JavaScript's
   * {start, end}. Of a set's document there is the passage only.
   */
  async openCitation(citation, number) {
    const { file_id: id, document: name, part, text } = citation;
    if (!this.dialog.open) this.opener = document.activeElement;
    this.#stopEditing();
    this.entry = this.documents.list.find((entry) => entry.id === id);
    byId("reader-name").textContent = name;
    byId("reader-place").textContent = [number && `Passage ${number}`, part].filter(Boolean).join(" · ");
    byId("reader-error").textContent = "";
    byId("edit").hidden = !(this.entry?.isText && this.entry.status === "completed");
    this.#present();
    this.shown = citation;
    try {
      const content = id ? await this.documents.content(id) : { text, at: () => 0 };
      if (this.shown !== citation) return; // another one was opened meanwhile
      const { start, end } = citation.place ?? this.#place(citation, content);
      this.#show(content.text, start, end);
    } catch (error) {
      this.#show(text ?? "", 0, 0);
      byId("reader-error").textContent = error.message;
    }
  }

  close() {
    this.#stopEditing();
    this.dialog.close();
    if (this.opener?.isConnected) this.opener.focus();
  }

  #place({ file_id: id, start, end, text }, { at }) {
    if (!id) return { start: 0, end: text.length };
    return start === undefined ? { start: 0, end: 0 } : { start: at(start), end: at(end) };
  }

  /** Beside the conversation where there is room, else above it. */
  #present() {
    const isWide = matchMedia(WIDE).matches;
    if (this.dialog.open && this.isWide !== isWide) this.dialog.close();
    this.isWide = isWide;
    if (!this.dialog.open) isWide ? this.dialog.show() : this.dialog.showModal();
    byId("reader-text").focus({ preventScroll: true });
  }

  #show(text, start, end) {
    const root = byId("reader-text");
    root.replaceChildren();
    for (let from = 0; from < text.length; ) {
      const line = text.indexOf("\n", from + PART);
      const to = line < 0 ? text.length : line + 1;
      const [first, last] = [Math.max(from, Math.min(start, to)), Math.max(from, Math.min(end, to))];
      const part = element("p", {}, text.slice(from, first));
      if (last > first) part.append(element("mark", {}, text.slice(first, last)));
      part.append(text.slice(last, to));
      root.append(part);
      from = to;
    }
    const mark = root.querySelector("mark");
    if (mark) mark.scrollIntoView({ block: "center" });
    else root.scrollTop = 0;
  }

  async #edit() {
    const { text } = await this.documents.content(this.entry.id);
    byId("edited").value = text;
    this.#setEditing(true);
    byId("edited").focus();
    byId("edited").setSelectionRange(0, 0);
    byId("edited").scrollTop = 0;
  }

  #stopEditing() {
    if (!byId("editor").hidden) this.#setEditing(false);
  }

  #setEditing(isEditing) {
    byId("editor").hidden = !isEditing;
    byId("reader-text").hidden = isEditing;
    byId("edit").hidden = isEditing;
    byId("reader-error").textContent = "";
    if (!isEditing) byId("edit").focus();
  }

  async #save(event) {
    event.preventDefault();
    const old = this.entry;
    const { text } = await this.documents.content(old.id);
    const edited = byId("edited").value; // whose lines end in \n alone
    const ends = text.includes("\r\n") ? edited.replaceAll("\n", "\r\n") : edited;
    byId("save").disabled = true;
    byId("save").textContent = "It is read …";
    try {
      const entry = ends === text ? old : await this.documents.replace(old, ends);
      if (this.entry !== old) return; // another one was opened meanwhile
      await this.openEntry(entry);
      byId("reader-place").textContent = entry.note;
    } catch (error) {
      byId("reader-error").textContent = error.message;
    } finally {
      byId("save").disabled = false;
      byId("save").textContent = "Save and read";
    }
  }
}
