// The documents as people see them: which are asked, how far each is read, and what can be done with it.

import { element, percent } from "./dom.js";

export class DocumentList {
  /** `actions`: open(entry) and remove(entry). */
  constructor(list, actions) {
    this.list = list;
    this.actions = actions;
    this.items = new Map();
  }

  /** Show these entries; items stay the same elements, so that the focus stays where it is. */
  show(entries) {
    for (const [entry, item] of this.items) {
      if (entries.includes(entry)) continue;
      if (item.root.contains(document.activeElement)) document.getElementById("files").focus();
      item.root.remove();
      this.items.delete(entry);
    }
    entries.forEach((entry, index) => {
      if (!this.items.has(entry)) this.items.set(entry, new Item(entry, this.actions));
      const { root } = this.items.get(entry);
      if (this.list.children[index] !== root) this.list.insertBefore(root, this.list.children[index] ?? null);
      this.items.get(entry).update();
    });
  }
}

class Item {
  constructor(entry, actions) {
    this.entry = entry;
    this.asked = element("input", {
      type: "checkbox",
      "aria-label": `Ask ${entry.name}`,
      title: "Whether questions are about it",
      onchange: () => {
        entry.isAsked = this.asked.checked;
      },
    });
    this.name = element("button", { type: "button", class: "name", onclick: () => actions.open(entry) }, entry.name);
    this.removal = element(
      "button",
      { type: "button", class: "quiet", "aria-label": `Remove ${entry.name}`, onclick: () => actions.remove(entry) },
      "✕",
    );
    this.bar = element("progress", { max: 1, "aria-label": `Reading ${entry.name}` });
    this.state = element("small", { class: "state" });
    this.root = element("li", {}, this.asked, this.name, this.removal, this.bar, this.state);
  }

  update() {
    const { entry } = this;
    const isRead = entry.status === "completed";
    this.root.dataset.status = entry.status;
    this.asked.checked = entry.isAsked;
    this.asked.disabled = entry.status === "failed";
    this.name.disabled = !isRead;
    this.bar.hidden = !["uploading", "in_progress"].includes(entry.status);
    this.bar.value = entry.share;
    this.state.textContent = this.words();
  }

  words() {
    const { status, share, error, note } = this.entry;
    if (status === "uploading") return share ? `Sent ${percent(share)}` : "Waits to be sent";
    if (status === "in_progress") return share ? `Read ${percent(share)}` : "Waits to be read";
    return status === "completed" ? note : error || "It was not read.";
  }
}
