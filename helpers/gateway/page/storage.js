// What stays in the browser: conversations and the theme in localStorage, the key in sessionStorage of this tab only.

const PREFIX = `helpers-chat ${location.pathname} `; // another gateway may be mounted on the same origin
const CONVERSATION = `${PREFIX}conversation `, THEME = `${PREFIX}theme`;
const KEY = `${PREFIX}key`, CURRENT = `${PREFIX}current`;

const areaOf = name => {
    try {
        return window[name];
    } catch { // the browser's settings forbid it
        return null;
    }
};
const local = areaOf("localStorage"), session = areaOf("sessionStorage");
let key = session?.getItem(KEY) ?? "";

export const getKey = () => key;

export const setKey = value => {
    key = value;
    if (value) write(session, KEY, value);
    else session?.removeItem(KEY);
};

export const getTheme = () => local?.getItem(THEME) ?? "";

export const setTheme = theme => write(local, THEME, theme);

// Return all conversations, latest first.
export const conversations = () =>
    Object.keys(local ?? {})
        .filter(name => name.startsWith(CONVERSATION))
        .map(name => load(name.slice(CONVERSATION.length)))
        .filter(Boolean)
        .sort((one, other) => other.changed - one.changed);

// Return the conversation of this tab, or else the latest one, or null.
export const lastConversation = () => load(session?.getItem(CURRENT)) ?? conversations()[0] ?? null;

// Return a conversation, or null if it is not there.
export const load = id => {
    try {
        const found = JSON.parse(local?.getItem(CONVERSATION + id) ?? "null");
        return Array.isArray(found?.turns) ? found : null;
    } catch {
        return null;
    }
};

// Save a conversation, and remember it as that of this tab. Return a sentence if that failed, or "".
export const save = conversation => {
    remember(conversation.id);
    if (!local) return "The browser stores nothing for this page. Export the conversations that you want to keep.";
    const isSaved = write(local, CONVERSATION + conversation.id, JSON.stringify(conversation));
    return isSaved ? "" : "The browser's storage is full. Export this conversation, or delete others.";
};

export const remember = id => write(session, CURRENT, id);

export const remove = id => local?.removeItem(CONVERSATION + id);

// Call `listener` with the id of each conversation that another tab changes.
export const onChange = listener =>
    window.addEventListener("storage", event => {
        if (event.key?.startsWith(CONVERSATION)) listener(event.key.slice(CONVERSATION.length));
    });

// Return whether there was space.
const write = (area, name, value) => {
    try {
        area?.setItem(name, value);
        return true;
    } catch {
        return false;
    }
};
