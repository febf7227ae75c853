// The page: a chat with the model behind the gateway. This module reacts to the user and to the answers.

import {ENDINGS, fromFile, newConversation, newTurn, requestOf, titleOf, toFile} from "./conversation.js";
import {GatewayError, loadModel, streamChat} from "./gateway.js";
import {fillSettings, readSettings} from "./settings.js";
import * as storage from "./storage.js";
import {TurnList, sends} from "./turns.js";

const find = id => document.getElementById(id);
const [entry, scroller, notice, dialog] = ["entry", "scroller", "notice", "settings"].map(find);
const settingsForm = find("settings-form");

let conversation = storage.lastConversation() ?? newConversation();
let model = null; // until the gateway has named it
let running = null; // { abort, ended, leave } of the answer that is running
let retry = null; // what "Retry" in the notice does

const list = new TurnList(find("log"), {
    onRegenerate: () => {
        const {turns} = conversation;
        ask(turns.at(-1).question, turns.slice(0, -1));
        entry.focus();
    },
    onEdit: (number, question) => {
        ask(question, conversation.turns.slice(0, number));
        entry.focus();
    },
});

// --- Asking

// Ask `question` after the turns `kept`. If no word of the answer arrives, the answers that it replaces come back.
const ask = async (question, kept) => {
    if (running || !settingsAreValid()) return;
    const own = conversation, before = own.turns, turn = newTurn(question);
    const isLost = () => !turn.text && before.slice(kept.length).some(({text}) => text);
    const controller = new AbortController();
    let end;
    const ended = new Promise(resolve => end = resolve);
    const leave = () => {
        controller.abort(); // the browser is about to end the request, which is not a failure
        turn.finish_reason ??= "cancelled";
        storage.save({...own, turns: isLost() ? before : own.turns});
    };
    running = {abort: () => controller.abort(), ended, leave};
    own.turns = [...kept, turn];
    hideNotice();
    draw("Waiting for the first word …");
    scrollToEnd();
    try {
        await read(turn, requestOf(own, kept, question), controller.signal);
    } catch (error) {
        if (controller.signal.aborted) turn.finish_reason ??= "cancelled";
        else [turn.finish_reason, turn.error] = ["error", sentenceOf(error)];
    }
    running = null;
    const hasFailed = ["cancelled", "error"].includes(turn.finish_reason) && isLost();
    if (hasFailed) own.turns = before;
    save(own);
    if (hasFailed && turn.error) showNotice(turn.error, () => ask(question, kept));
    draw(`Answer ${ENDINGS[turn.finish_reason] ?? turn.finish_reason}.`, hasFailed ? "" : turn.error);
    end();
};

// Read the answer into `turn`.
const read = async (turn, fields, signal) => {
    model ??= await describeModel(signal);
    const started = performance.now();
    for await (const {choices: [choice], usage} of streamChat({...fields, model: model.id}, storage.getKey(), signal)) {
        if (usage) turn.usage = usage;
        if (choice?.delta.content) {
            turn.seconds = (performance.now() - started) / 1000;
            turn.first ??= turn.seconds;
            addText(turn, choice.delta.content);
        }
        if (choice?.finish_reason) turn.finish_reason = choice.finish_reason;
    }
    turn.finish_reason ??= "stop";
};

const addText = (turn, text) => {
    if (!turn.text) say("Answering …");
    turn.text += text;
    list.grow(turn);
};

const stop = async () => {
    running?.abort();
    await running?.ended;
};

// Return the sentence about a failure, and ask for a key if one is missing.
const sentenceOf = error => {
    model = null; // another one may run when the service is back
    if (error.status === 401) askForKey();
    if (!(error instanceof GatewayError)) console.error(error);
    return error instanceof GatewayError ? error.message : `The page failed (${error.name}). Reload it.`;
};

const describeModel = async signal => {
    const described = await loadModel(storage.getKey(), signal);
    find("model").textContent = described.id;
    find("key-form").hidden = true;
    return described;
};

const connect = async () => {
    hideNotice();
    try {
        model = await describeModel();
    } catch (error) {
        const sentence = sentenceOf(error);
        if (error.status !== 401 || storage.getKey()) showNotice(sentence, error.status === 401 ? null : connect);
    }
    draw();
};

const askForKey = () => {
    find("key-form").hidden = false;
    find("key").focus();
};

// --- Drawing

// Draw everything but the settings. Without a `status`, the line below the entry stays.
const draw = (status, more = "") => {
    list.draw(conversation.turns, Boolean(running));
    find("empty").hidden = conversation.turns.length > 0;
    find("send").hidden = Boolean(running);
    find("stop").hidden = !running;
    find("forget-key").hidden = !storage.getKey();
    drawConversations();
    if (status !== undefined) say(status, more);
    if (!document.activeElement?.offsetParent && !dialog.open) entry.focus(); // a button that is hidden loses the focus
};

const drawConversations = () => {
    const stored = storage.conversations();
    if (!stored.some(({id}) => id === conversation.id)) stored.unshift(conversation);
    const options = stored.map(one => new Option(titleOf(one), one.id, false, one.id === conversation.id));
    find("conversations").replaceChildren(...options);
};

// Say something below the entry. Screen readers read it aloud, and `more`, which stands elsewhere on the page.
const say = (text, more = "") => {
    const unseen = document.createElement("span");
    unseen.className = "unseen";
    unseen.textContent = more && ` ${more}`;
    find("status").replaceChildren(text, unseen);
};

const showNotice = (text, action = null) => {
    retry = action;
    find("retry").hidden = !action;
    notice.hidden = false;
    find("notice-text").textContent = text;
};

const hideNotice = () => notice.hidden = true;

// The page follows an answer unless the user has scrolled up. `lastTop` is where the page was scrolled to last.
let follows = true, lastTop = 0;
const scrollToEnd = () => {
    follows = true;
    scroller.scrollTop = scroller.scrollHeight;
};
const follow = new ResizeObserver(() => follows && scrollToEnd());
follow.observe(scroller);
follow.observe(find("log"));

// --- Conversations

const save = changed => {
    changed.changed = Date.now();
    const problem = storage.save(changed);
    if (problem) showNotice(problem);
};

const open = async other => {
    await stop();
    conversation = other;
    storage.remember(other.id);
    fillSettings(settingsForm, conversation);
    hideNotice();
    draw("");
    scrollToEnd();
};

const exportFile = () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([toFile(conversation)], {type: "application/json"}));
    link.download = "conversation.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
};

const importFile = async ({target}) => {
    const [file] = target.files;
    target.value = ""; // so that the same file can be chosen again
    dialog.close();
    try {
        const imported = await fromFile(file, conversation);
        await open(imported);
        save(imported);
        draw("Conversation imported.");
    } catch (error) {
        showNotice(error.message);
    }
};

const deleteConversation = async () => {
    if (!confirm("Delete this conversation?")) return;
    await stop();
    storage.remove(conversation.id);
    dialog.close();
    await open(storage.conversations()[0] ?? newConversation(conversation));
};

const settingsAreValid = () => {
    if (settingsForm.checkValidity()) return true;
    openSettings();
    settingsForm.reportValidity();
    return false;
};

const openSettings = () => dialog.open || dialog.showModal();

const setTheme = theme => document.documentElement.dataset.theme = find("theme").value = theme;

// --- The user

const on = (id, event, listener) => find(id).addEventListener(event, listener);

on("scroller", "scroll", () => {
    const isAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
    follows = isAtEnd || (follows && scroller.scrollTop >= lastTop); // the answer may have grown since
    lastTop = scroller.scrollTop;
});
on("ask-form", "submit", event => {
    event.preventDefault();
    const question = entry.value.trim();
    if (!question || running || !settingsAreValid()) return;
    entry.value = "";
    ask(question, conversation.turns);
});
on("entry", "keydown", event => {
    if (!sends(event)) return;
    event.preventDefault();
    find("ask-form").requestSubmit();
});
on("stop", "click", stop);
on("retry", "click", () => retry());
on("dismiss", "click", () => {
    hideNotice();
    entry.focus();
});
on("key-form", "submit", event => {
    event.preventDefault();
    storage.setKey(find("key").value.trim());
    find("key").value = "";
    connect();
});
on("conversations", "change", ({target}) => open(storage.load(target.value) ?? conversation));
on("new", "click", async () => {
    await open(newConversation(conversation));
    entry.focus();
});
on("open-settings", "click", openSettings);
on("close-settings", "click", () => dialog.close());
on("settings-form", "submit", event => event.preventDefault());
on("settings-form", "input", () => {
    conversation.system = settingsForm.elements.system.value;
    conversation.settings = readSettings(settingsForm);
    if (!running) save(conversation);
});
on("theme", "change", ({target}) => {
    setTheme(target.value);
    storage.setTheme(target.value);
});
on("export", "click", exportFile);
on("import", "click", () => find("file").click());
on("file", "change", importFile);
on("delete", "click", deleteConversation);
on("forget-key", "click", () => {
    storage.setKey("");
    model = null;
    dialog.close();
    connect();
});
document.addEventListener("keydown", event => {
    if (event.key !== "Escape" || dialog.open || event.isComposing) return;
    if (!list.cancelEdit()) stop();
});
window.addEventListener("pagehide", () => running?.leave());
storage.onChange(id => {
    const changed = id === conversation.id && !running && storage.load(id);
    if (changed) open(changed);
    else drawConversations();
});

setTheme(storage.getTheme());
fillSettings(settingsForm, conversation);
draw();
scrollToEnd();
entry.focus();
connect();
