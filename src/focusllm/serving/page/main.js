// The page's parts, put together.

import * as api from "./api.js";
import { Conversation } from "./conversation.js";
import { DocumentList } from "./document_list.js";
import { Documents } from "./documents.js";
import { byId, element } from "./dom.js";
import { Reader } from "./reader.js";

const documents = new Documents(() => list.show(documents.list));
const reader = new Reader(documents);
const list = new DocumentList(byId("documents"), {
  open: (entry) => reader.openEntry(entry),
  remove: (entry) => told(documents.remove(entry)),
});
const conversation = new Conversation(byId("conversation"), {
  documents,
  models: () => ({ asked: byId("model").value, plain }),
  open: (citation, number) => reader.openCitation(citation, number),
  onBusy: setBusy,
});
let plain = ""; // the model's own name

/** Wait for something of the documents; what goes wrong is said beside them. */
async function told(promise) {
  byId("documents-error").textContent = "";
  try {
    await promise;
  } catch (error) {
    byId("documents-error").textContent = error.message;
  }
}

async function start() {
  const names = (await api.get("models")).data.map((model) => model.id);
  plain = names[0];
  const select = byId("model");
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  if (names.includes(chosen)) select.value = chosen;
  select.disabled = names.length < 2;
  byId("key-form").hidden = true;
  byId("workspace").hidden = false;
  await documents.load().catch((error) => {
    byId("drop").hidden = error.code === "no_files"; // there is only the model
    throw error;
  });
}

function setBusy(isBusy) {
  const [shown, other] = isBusy ? [byId("stop"), byId("send")] : [byId("send"), byId("stop")];
  const isFree = [other, document.body].includes(document.activeElement); // of a button that goes away
  shown.hidden = false;
  if (isFree) shown.focus({ preventScroll: true });
  other.hidden = true;
}

function fitQuestion() {
  const question = byId("question");
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

function addFiles(files) {
  byId("documents-error").textContent = "";
  for (const file of files) documents.add(file);
}

api.onKeyNeeded((message) => {
  const isFirst = byId("key-form").hidden;
  byId("key-form").hidden = false;
  byId("workspace").hidden = true;
  byId("key-error").textContent = isFirst && !byId("key").value ? "" : message;
  byId("key").focus();
});

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.useKey(byId("key").value.trim());
  told(start());
});

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = byId("question").value.trim();
  if (!question || conversation.running.size) return;
  byId("question").value = "";
  fitQuestion();
  byId("intro").hidden = true;
  conversation.ask(question);
});
byId("question").addEventListener("input", fitQuestion);
byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});
byId("stop").addEventListener("click", () => conversation.stop());
byId("fresh").addEventListener("click", () => {
  conversation.clear();
  byId("intro").hidden = false;
  byId("question").focus();
});

byId("files").addEventListener("change", (event) => {
  addFiles(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
});
for (const kind of ["dragenter", "dragover"])
  addEventListener(kind, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    byId("drop").classList.add("over");
  });
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("drop").classList.remove("over");
});
addEventListener("drop", (event) => {
  byId("drop").classList.remove("over");
  if (!event.dataTransfer?.files.length) return;
  event.preventDefault();
  addFiles(event.dataTransfer.files);
});

told(start());
