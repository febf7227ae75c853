// The turns on the page: questions, answers and the buttons below them.

import {copyButton} from "./clipboard.js";
import {summaryOf} from "./conversation.js";
import {MarkdownView} from "./markdown.js";

// Return whether a key sends a text: Enter, unless it chooses a word in an input method (229, in Safari).
export const sends = ({key, shiftKey, isComposing, keyCode}) =>
    key === "Enter" && !shiftKey && !isComposing && keyCode !== 229;

// Shows the turns in `log`. `onRegenerate()` and `onEdit(number, question)` are called for the user's wishes.
export class TurnList {
    constructor(log, {onRegenerate, onEdit}) {
        this.log = log;
        this.handlers = {onRegenerate, onEdit, onBeginEdit: () => this.cancelEdit()};
        this.views = new Map(); // turn → view
    }

    // Show exactly these turns. While an answer is running, no other one can be asked for.
    draw(turns, isRunning) {
        this.views = new Map(turns.map(turn => [turn, this.views.get(turn) ?? new TurnView(turn, this.handlers)]));
        const articles = [...this.views.values()].map(({article}) => article);
        if (articles.some((article, number) => article !== this.log.children[number])) {
            this.log.replaceChildren(...articles);
        }
        while (this.log.children.length > articles.length) this.log.lastElementChild.remove();
        turns.forEach((turn, number) => {
            this.views.get(turn).draw(number + 1, {isLast: number + 1 === turns.length, isRunning});
        });
    }

    // Show the text that has arrived, in the next frame: a model may be faster than the screen.
    grow(turn) {
        this.frame ??= requestAnimationFrame(() => {
            this.frame = null;
            this.views.get(turn)?.drawText();
        });
    }

    // End the edit that is open, if any, and return whether there was one.
    cancelEdit() {
        return [...this.views.values()].some(view => view.cancelEdit());
    }
}

class TurnView {
    constructor(turn, handlers) {
        this.turn = turn;
        this.handlers = handlers;
        this.question = made("p", "question");
        this.question.dir = "auto";
        this.question.textContent = turn.question;
        this.text = made("div", "text");
        this.markdown = new MarkdownView(this.text);
        this.error = made("p", "error");
        this.summary = made("p", "summary");
        this.edit = button("Edit", () => this.beginEdit());
        this.copy = copyButton("Copy the answer", () => turn.text);
        this.regenerate = button("Regenerate", () => handlers.onRegenerate());
        const asked = made("div", "asked", heading("You"), this.question, made("div", "actions", this.edit));
        const actions = made("div", "actions", this.copy, this.regenerate);
        const answered = made("div", "answered", heading("Model"), this.text, this.error, this.summary, actions);
        this.article = made("article", "turn", asked, answered);
        this.asked = asked;
    }

    draw(number, {isLast, isRunning}) {
        const {text, error, finish_reason} = this.turn;
        this.number = number;
        this.article.ariaLabel = `Turn ${number}`;
        this.article.ariaBusy = String(!finish_reason);
        this.edit.ariaLabel = `Edit question ${number}`;
        this.edit.disabled = this.regenerate.disabled = isRunning;
        this.copy.hidden = !text;
        this.regenerate.hidden = !isLast || !finish_reason;
        this.regenerate.textContent = error ? "Retry" : "Regenerate";
        this.error.textContent = error ?? "";
        this.summary.textContent = summaryOf(this.turn);
        this.drawText();
        if (isRunning) this.cancelEdit();
    }

    drawText() {
        this.markdown.update(this.turn.text);
    }

    beginEdit() {
        this.handlers.onBeginEdit(); // ends another one
        const field = made("textarea", "");
        field.value = this.turn.question;
        field.ariaLabel = `Question ${this.number}`;
        field.dir = "auto";
        field.rows = Math.min(field.value.split("\n").length + 1, 8);
        const ask = () => field.value.trim() && this.handlers.onEdit(this.number - 1, field.value.trim());
        field.addEventListener("keydown", event => {
            if (!sends(event)) return;
            event.preventDefault();
            ask();
        });
        const buttons = made("div", "actions", button("Ask again", ask), button("Cancel", () => this.cancelEdit()));
        this.form = made("div", "edit", field, buttons);
        this.asked.hidden = true;
        this.asked.after(this.form);
        field.focus();
    }

    cancelEdit() {
        if (!this.form) return false;
        const hadFocus = this.form.contains(document.activeElement);
        this.form.remove();
        this.form = null;
        this.asked.hidden = false;
        if (hadFocus) this.edit.focus();
        return true;
    }
}

const made = (tag, className, ...children) => {
    const element = document.createElement(tag);
    element.className = className;
    element.append(...children);
    return element;
};

const button = (label, action) => {
    const element = made("button", "", label);
    element.type = "button";
    element.addEventListener("click", action);
    return element;
};

const heading = text => made("h2", "unseen", text);
