// The documents that the server has for us: files of one vector store, which is found again by its name.

import * as api from "./api.js";
import { places } from "./characters.js";

const STORE = "Documents of the page";
const POLL = 200; // milliseconds
const TEXT = /(\.(txt|md|rst|tex|json|csv|tsv|log|py)|^[^.]+)$/i;

export class Documents {
  /** `onChange` is called whenever something is known anew. */
  constructor(onChange) {
    this.list = [];
    this.onChange = onChange;
    this.sending = Promise.resolve();
    this.contents = new Map(); // by file id; those of replaced files stay, for the answers that cite them
  }

  /** What is there from before. */
  async load() {
    const stores = await api.all("vector_stores");
    this.store = stores.find((store) => store.name === STORE)?.id;
    if (!this.store) return;
    const [files, attached] = await Promise.all([api.all("files"), api.all(`vector_stores/${this.store}/files`)]);
    const names = new Map(files.map((file) => [file.id, file.filename]));
    const known = new Set(this.list.map((entry) => entry.id));
    for (const state of attached.reverse()) {
      if (known.has(state.id)) continue;
      const entry = this.#entry(names.get(state.id) ?? state.id);
      this.#take(entry, state);
      if (entry.status === "in_progress") this.#follow(entry).catch((error) => this.#fail(entry, error));
    }
    this.onChange();
  }

  /** Send a file and have it read; resolves when it is read, or when it is known why not. */
  async add(file, name = file.name) {
    const entry = this.#entry(name);
    try {
      await this.#send(entry, file);
      await this.#follow(entry);
    } catch (error) {
      this.#fail(entry, error);
    }
    return entry;
  }

  /** Put another text in a document's place; tells how many of its chunks are new. */
  async replace(old, text) {
    const before = await this.content(old.id);
    const entry = await this.add(new Blob([text], { type: "text/plain" }), old.name);
    if (entry.status !== "completed") {
      await this.remove(entry).catch(() => this.#drop(entry));
      throw new api.ApiError(entry.error || "The new text was not read; the old one is still there.");
    }
    entry.isAsked = old.isAsked;
    const after = await this.content(entry.id);
    const known = new Set(before.chunks.map(({ start, end }) => before.text.slice(start, end)));
    const fresh = after.chunks.filter(({ start, end }) => !known.has(after.text.slice(start, end)));
    entry.note = `${fresh.length} of ${after.chunks.length} chunks new`;
    this.list.splice(this.list.indexOf(entry), 1);
    this.list.splice(this.list.indexOf(old), 0, entry); // where the old one is
    await this.remove(old);
    return entry;
  }

  /** Take a document out of the server. */
  async remove(entry) {
    if (entry.id) {
      await api.remove(`files/${entry.id}`).catch((error) => {
        if (error.status !== 404) throw error;
      });
    }
    this.#drop(entry);
  }

  /** Those that questions are about. */
  get asked() {
    return this.list.filter((entry) => entry.isAsked && ["in_progress", "completed"].includes(entry.status));
  }

  /** The text of a file and its chunks, as [start, end) of JavaScript's characters. */
  content(id) {
    if (!this.contents.has(id)) {
      const content = this.#content(id);
      content.catch(() => this.contents.delete(id));
      this.contents.set(id, content);
    }
    return this.contents.get(id);
  }

  async #content(id) {
    const found = await api.get(`vector_stores/${this.store}/files/${id}/content`);
    const text = found.data.map((part) => part.text).join("");
    const at = places(text);
    return { text, at, chunks: found.chunks.map(({ start, end }) => ({ start: at(start), end: at(end) })) };
  }

  #entry(name) {
    const entry = {
      ...{ id: null, name, status: "uploading", share: 0, error: "", note: "" },
      ...{ isAsked: true, isText: TEXT.test(name) },
    };
    this.list.push(entry);
    this.onChange();
    return entry;
  }

  /** Files go one after another, so that the server has them in our order. */
  #send(entry, file) {
    const sent = this.sending.then(() => this.#attach(entry, file));
    this.sending = sent.catch(() => {}); // the next one goes all the same
    return sent;
  }

  async #attach(entry, file) {
    const sent = await api.upload(file, entry.name, (share) => {
      entry.share = share;
      this.onChange();
    });
    if (!this.list.includes(entry)) return api.remove(`files/${sent.id}`); // removed meanwhile
    entry.id = sent.id;
    this.store ??= (await api.create("vector_stores", { name: STORE })).id;
    this.#take(entry, await api.create(`vector_stores/${this.store}/files`, { file_id: sent.id }));
  }

  async #follow(entry) {
    while (entry.status === "in_progress" && this.list.includes(entry)) {
      await new Promise((resolve) => setTimeout(resolve, POLL));
      if (this.list.includes(entry)) this.#take(entry, await api.get(`vector_stores/${this.store}/files/${entry.id}`));
    }
  }

  #take(entry, state) {
    entry.id = state.id;
    entry.status = state.status;
    entry.share = state.progress?.total ? state.progress.processed / state.progress.total : 0;
    entry.error = state.last_error?.message ?? "";
    this.onChange();
  }

  #fail(entry, error) {
    entry.status = "failed";
    entry.error = error.message;
    this.onChange();
  }

  #drop(entry) {
    this.list = this.list.filter((other) => other !== entry);
    this.onChange();
  }
}
