// Questions and answers, one after another; what was said before goes along with the next question.

import { Answer } from "./answer.js";
import * as api from "./api.js";
import { element } from "./dom.js";

export class Conversation {
  /**
   * `root`: where turns are shown. `documents`: those that are asked. `open`: see Answer.
   * `models`: {asked, plain}, the one that is chosen, and the one that knows no documents.
   */
  constructor(root, documents, open, onBusy) {
    Object.assign(this, { root, documents, open, onBusy });
    this.turns = [];
    this.running = new Set();
  }

  /** Begin anew. */
  clear() {
    this.stop();
    this.turns = [];
    this.root.replaceChildren();
  }

  /** Stop all answers that are being written. */
  stop() {
    for (const controller of this.running) controller.abort();
  }

  /** Ask a question; resolves when its answer is there. */
  async ask(question, models) {
    const turn = { question, models, answers: element("div", { class: "answers" }) };
    turn.root = element("section", { class: "turn" }, element("h2", { class: "question" }, question), turn.answers);
    const history = [...this.turns];
    this.turns.push(turn);
    this.root.append(turn.root);
    turn.root.scrollIntoView({ block: "start" });
    const files = this.documents.asked.map(({ id, name }) => ({ id, name }));
    const hasDocuments = files.length > 0 || models.asked !== models.plain;
    turn.answer = new Answer("Answer", this.documents, this.open);
    const messages = [...said(history, "answer"), { role: "user", content: question }];
    if (files.length) messages[0] = { role: "user", content: [...files.map(filePart), textPart(messages[0].content)] };
    await this.#answered(turn, turn.answer, { model: models.asked, messages }, files);
    if (hasDocuments) this.#offerWithout(turn, history);
  }

  /** A button for the same question to the model alone. */
  #offerWithout(turn, history) {
    const button = element("button", { type: "button", class: "quiet without" }, "Ask the same without the documents");
    button.addEventListener("click", async () => {
      button.remove();
      turn.answer.root.querySelector("h3").textContent = "With the documents";
      turn.answers.classList.add("beside");
      turn.alone = new Answer("Without the documents", this.documents, this.open);
      const messages = [...said(history, "alone"), { role: "user", content: turn.question }];
      await this.#answered(turn, turn.alone, { model: turn.models.plain, messages }, []);
    });
    turn.root.append(button);
  }

  async #answered(turn, answer, body, files) {
    const controller = new AbortController();
    this.running.add(controller);
    this.onBusy(true);
    turn.answers.append(answer.root);
    try {
      for await (const event of api.chat({ ...body, stream_options: { include_usage: true } }, controller.signal))
        answer.take(event);
      await answer.finish(files);
    } catch (error) {
      const isStopped = error.name === "AbortError";
      answer.fail(isStopped ? "Stopped." : error.message, !isStopped);
    } finally {
      this.running.delete(controller);
      this.onBusy(this.running.size > 0);
    }
  }
}

/** The messages of earlier turns, of those that were answered in this way. */
function said(turns, kind) {
  return turns
    .filter((turn) => turn[kind]?.text.trim())
    .flatMap((turn) => [
      { role: "user", content: turn.question },
      { role: "assistant", content: turn[kind].text },
    ]);
}

function filePart({ id }) {
  return { type: "file", file: { file_id: id } };
}

function textPart(text) {
  return { type: "text", text };
}
