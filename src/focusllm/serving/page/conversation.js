// Questions and answers, one after another; what was said before goes along with the next question.

import { Answer } from "./answer.js";
import * as api from "./api.js";
import { element } from "./dom.js";

export class Conversation {
  /**
   * `root`: where turns are shown. `documents`: those that are asked. `models()`: {asked, plain}, the one that is
   * chosen and the one that knows no documents. `open(citation, number)` shows a passage. `onBusy(isBusy)` is told
   * whether answers are being written.
   */
  constructor(root, { documents, models, open, onBusy }) {
    Object.assign(this, { root, documents, models, open, onBusy });
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
  async ask(question) {
    const { asked, plain } = this.models();
    const files = this.documents.asked.map(({ id, name }) => ({ id, name }));
    const history = [...this.turns];
    history.at(-1)?.again?.remove();
    const turn = {
      question,
      answer: new Answer("Answer", this.documents, this.open),
      answers: element("div", { class: "answers" }),
      actions: element("div", { class: "actions" }),
    };
    this.turns.push(turn);
    const root = element("section", { class: "turn" }, element("h2", {}, question), turn.answers, turn.actions);
    this.root.append(root);
    root.scrollIntoView({ block: "start" });
    const messages = [...said(history, "answer"), { role: "user", content: question }];
    if (files.length) messages[0] = { ...messages[0], content: withFiles(messages[0].content, files) };
    await this.#answered(turn, turn.answer, { model: asked, messages }, files);
    if (!this.turns.includes(turn)) return; // another conversation has begun
    if (files.length || asked !== plain) this.#offerAlone(turn, plain, history);
    if (turn === this.turns.at(-1)) this.#offerAgain(turn);
  }

  /** A button for the same question to the model alone. */
  #offerAlone(turn, model, history) {
    this.#offer(turn, "Ask the same without the documents", () => {
      turn.answer.rename("With the documents");
      turn.answers.classList.add("beside");
      turn.alone = new Answer("Without the documents", this.documents, this.open);
      const messages = [...said(history, "alone"), { role: "user", content: turn.question }];
      return this.#answered(turn, turn.alone, { model, messages }, []);
    });
  }

  /** A button for the same question as if it had not been asked: of documents that were changed since. */
  #offerAgain(turn) {
    turn.again = this.#offer(turn, "Ask again", () => {
      this.turns = this.turns.filter((other) => other !== turn);
      return this.ask(turn.question);
    });
  }

  #offer(turn, words, act) {
    const button = element("button", { type: "button", class: "quiet" }, words);
    button.addEventListener("click", () => {
      if (this.running.size) return;
      button.remove();
      act();
    });
    turn.actions.append(button);
    return button;
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

/** What a message says, with files before it. */
function withFiles(text, files) {
  return [...files.map(({ id }) => ({ type: "file", file: { file_id: id } })), { type: "text", text }];
}
